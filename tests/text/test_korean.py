"""Korean transcription marks: which are removed, which stay, and that no digit is lost."""

import unicodedata
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxray.text.korean import clean_transcript

LINES = [  # raw, spelling, phonetic (None: the same), notes
    # The lines that lhotse, ESPnet and kospeech break (facts, section 1)
    ("혈압이 120/80 이고요", "혈압이 120/80 이고요", None, ()),
    ("하루에 5 ml/분 정도", "하루에 5 ml/분 정도", None, ()),
    ("(그) / (거)+ 그거 +뭐", "그 그거 뭐", "거 그거 뭐", ()),
    ("(이거 하나만", "(이거 하나만", None, ("unbalanced_brackets",)),
    ("w1+w2 ...", "w1+w2 ...", None, ()),
    ("u/ 그래서", "그래서", None, ("unk",)),
    # Dual notation
    ("(70%)/(칠 십 퍼센트) 확률로", "70% 확률로", "칠 십 퍼센트 확률로", ()),
    ("(5 ml)/(오 미리)를 (2번)/(두 번) 요", "5 ml를 2번 요", "오 미리를 두 번 요", ()),
    ("(120/80)/(백이십에 팔십)", "120/80", "백이십에 팔십", ()),
    ("혈압 (120)/(80) 이요", "혈압 (120)/(80) 이요", None, ("number_pair",)),
    ("(A4)/(에이 4) 용지", "A4 용지", "에이 4 용지", ()),
    ("((1)/(일))/(하나)", "((1)/(일))/(하나)", None, ("nested_brackets",)),
    ("(웃음) 네", "(웃음) 네", None, ()),
    ("(3) b/ / (삼) 네", "3 네", "삼 네", ("noise",)),
    ("이거) 하나(만", "이거) 하나(만", None, ("unbalanced_brackets",)),
    # Mistyped pairs: a number and its reading, however they are typed; other brackets stay, with a note
    ("진짜 (100%)(백 프로)가 왜", "진짜 100%가 왜", "진짜 백 프로가 왜", ()),
    ("(70%):(칠십 퍼센트) 확률", "70% 확률", "칠십 퍼센트 확률", ()),
    ("(3)?(세) 개 주세요", "3 개 주세요", "세 개 주세요", ()),
    ("(3)/+(세) 개", "3 개", "세 개", ()),
    ("(1/하나) 번 (36.5도/삼십육 점 오 도)", "1 번 36.5도", "하나 번 삼십육 점 오 도", ()),
    ("아 ((3시)/(세 시))에 봐", "아 3시에 봐", "아 세 시에 봐", ()),
    ("（2개）/（두 개） 주세요", "2개 주세요", "두 개 주세요", ()),
    ("(1,250원)(천이백오십 원) (20 살) (스무 살)", "1,250원 20 살", "천이백오십 원 스무 살", ()),
    ("(010)(공일공) (16만)(십육만)", "010 16만", "공일공 십육만", ()),
    ("(5)(오늘) (T12)(척추)", "(5)(오늘) (T12)(척추)", None, ("odd_pair",)),
    ("(CT) (흉부) (웃음)(박수)", "(CT) (흉부) (웃음)(박수)", None, ()),
    ("하루 (1/일) (3회/식후) (120/80)", "하루 (1/일) (3회/식후) (120/80)", None, ()),
    ("(x)/((1)(일))", "(x)/1", "(x)/일", ()),
    ("(x)/((1)(일) 네)", "(x)/((1)(일) 네)", None, ("nested_brackets",)),
    # Marks of other AI-Hub corpora
    ("네 /(noise) 그래요/(bgm) @웃음", "네 그래요", None, ("noise",)),
    ("어~/ 그 3~5 네~", "어 그 3~5 네~", None, ()),
    ("그 + 그 사람 아+아+ 뭐", "그 그 사람 아 아 뭐", None, ()),
    ("@이름1 /(what) 네", "@이름1 /(what) 네", None, ("unknown_mark",)),
    ("혈압약 + 당뇨약 1 + 1", "혈압약 + 당뇨약 1 + 1", None, ("unknown_mark",)),
    # Noise tags
    ("b/ 아/ 모+ 몬 소리야 n/", "아 모 몬 소리야", None, ("noise",)),
    ("o/ l/ b/n/ 네", "네", None, ("noise",)),
    ("b/아 네", "아 네", None, ("noise",)),
    ("(3)/(삼) l/ 네", "3 네", "삼 네", ("noise",)),
    ("산소 5 l/min", "산소 5 l/min", None, ()),
    ("산소 5 l/분", "산소 5 l/분", None, ()),
    ("n/a 입니다", "n/a 입니다", None, ()),
    ("db/ 아", "db 아", None, ()),
    # Fillers, repeats, unclear words
    ("음/, 그/ 어/.", "음, 그 어.", None, ()),
    ("5 ml/min 으로 36.5 도", "5 ml/min 으로 36.5 도", None, ()),
    ("5 ml/ 분", "5 ml/ 분", None, ()),
    ("10/ 20+ 1+1", "10/ 20+ 1+1", None, ()),
    ("Rh+ A+ 형 HER2+ ok+ ok", "Rh+ A+ 형 HER2+ ok ok", None, ()),
    ("그*+ 뭐* 5*3 7*", "그 뭐 5*3 7", None, ("unclear",)),
    ("1일 3회/식후", "1일 3회/식후", None, ()),
    # NIKL
    ("{laughing} ((뭐지)) -그- 그거 &name1&", "뭐지 그 그거", None, ("noise", "unclear", "unk")),
    ("(()) 네 1-2 -5", "네 1-2 -5", None, ("unk",)),
    ("  네\t그래요\r\n", "네 그래요", None, ()),
    ("", "", None, ()),
]


@pytest.mark.parametrize(("raw", "spelling", "phonetic", "notes"), LINES)
def test_a_line(raw, spelling, phonetic, notes):
    cleaned = clean_transcript(raw)
    assert (cleaned.text, cleaned.spelling) == (spelling, spelling)
    assert cleaned.phonetic == (spelling if phonetic is None else phonetic)
    assert cleaned.notes == notes


def test_phonetic_reading():
    cleaned = clean_transcript("(70%)/(칠십 퍼센트) 네", "phonetic")
    assert (cleaned.text, cleaned.spelling, cleaned.phonetic) == ("칠십 퍼센트 네", "70% 네", "칠십 퍼센트 네")


def test_decomposed_hangul_is_cleaned_too():
    assert clean_transcript(unicodedata.normalize("NFD", "아/ 그+ 그거")).text == "아 그 그거"


MARKS = "()/+*{} .,?!bnlou0159가네mR-&@~:（）오일"
PIECES = st.sampled_from(
    [*MARKS, " (", ")/(", ")(", "120/80", "ml/", "(3)/(삼)", "(3)(삼", "(1/일", "((5)", " +", "u/", "그/ ", "/(noise)"]
)
MARKED = st.lists(PIECES, max_size=25).map("".join)


@settings(max_examples=500, deadline=None)
@given(MARKED | st.text(max_size=40))
@example("b/b/+*네/+")
@example("(1) u/ / (2)")
@example("((1)/(2))/(3)")
@example("((3)/(삼))/(120/80)")
@example("((1)(일))/(2)")
@example("(1/일)(일)/(5)")
def test_cleaning_twice_changes_nothing(raw):
    cleaned = clean_transcript(raw)
    for text in (cleaned.spelling, cleaned.phonetic):
        assert clean_transcript(text).spelling == clean_transcript(text).phonetic == text


@settings(max_examples=500, deadline=None)
@given(MARKED)
@example("((1)/(2))/(3)")
@example("(1)/(2) 3")
@example("(가)/((1)(일))")
@example("(1(1)(일)/일")
def test_no_digit_is_lost(raw):
    """Each digit is in one of the two readings (the number of an anonymised name is not spoken)."""
    raw = raw.replace("&", "")
    cleaned = clean_transcript(raw)
    both = Counter(cleaned.spelling) | Counter(cleaned.phonetic)
    either = Counter(cleaned.spelling) + Counter(cleaned.phonetic)
    for digit, count in Counter(char for char in raw if char.isdigit()).items():
        assert either[digit] >= count >= both[digit], digit
