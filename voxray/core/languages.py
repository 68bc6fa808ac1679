"""Codes and names of languages. A language has one code here, however a manifest or a flag writes it.

The codes are those of ISO 639-1, and of ISO 639-3 for Hawaiian and Cantonese, which Whisper has. Tests compare the
names with Whisper's own table.
"""

import re
from difflib import get_close_matches

from voxray.core.errors import BadRow

_NAMES = """
af=afrikaans,afr; am=amharic,amh; ar=arabic,ara,arb; as=assamese,asm; az=azerbaijani,aze; ba=bashkir,bak;
be=belarusian,bel; bg=bulgarian,bul; bn=bengali,ben; bo=tibetan,bod,tib; br=breton,bre; bs=bosnian,bos;
ca=catalan,valencian,cat; cs=czech,ces,cze; cy=welsh,cym,wel; da=danish,dan; de=german,deu,ger; el=greek,ell,gre;
en=english,eng; es=spanish,castilian,spa; et=estonian,est; eu=basque,eus,baq; fa=persian,farsi,fas,per; fi=finnish,fin;
fo=faroese,fao; fr=french,fra,fre; gl=galician,glg; gu=gujarati,guj; ha=hausa,hau; haw=hawaiian; he=hebrew,heb,iw;
hi=hindi,hin; hr=croatian,hrv; ht=haitian creole,haitian,hat; hu=hungarian,hun; hy=armenian,hye,arm;
id=indonesian,ind,in; is=icelandic,isl,ice; it=italian,ita; ja=japanese,jpn; jv=javanese,jav,jw; ka=georgian,kat,geo;
kk=kazakh,kaz; km=khmer,khm; kn=kannada,kan; ko=korean,kor; la=latin,lat; lb=luxembourgish,letzeburgesch,ltz;
ln=lingala,lin; lo=lao; lt=lithuanian,lit; lv=latvian,lav; mg=malagasy,mlg; mi=maori,mri,mao; mk=macedonian,mkd,mac;
ml=malayalam,mal; mn=mongolian,mon; mr=marathi,mar; ms=malay,msa,may,zsm; mt=maltese,mlt; my=myanmar,burmese,mya,bur;
ne=nepali,nep; nl=dutch,flemish,nld,dut; nn=nynorsk,nno; no=norwegian,nor,nb,nob; oc=occitan,oci;
pa=punjabi,panjabi,pan; pl=polish,pol; ps=pashto,pushto,pus; pt=portuguese,por; ro=romanian,moldavian,moldovan,ron,rum;
ru=russian,rus; sa=sanskrit,san; sd=sindhi,snd; si=sinhala,sinhalese,sin; sk=slovak,slk,slo; sl=slovenian,slv;
sn=shona,sna; so=somali,som; sq=albanian,sqi,alb; sr=serbian,srp; su=sundanese,sun; sv=swedish,swe; sw=swahili,swa,swh;
ta=tamil,tam; te=telugu,tel; tg=tajik,tgk; th=thai,tha; tk=turkmen,tuk; tl=tagalog,filipino,tgl,fil; tr=turkish,tur;
tt=tatar,tat; uk=ukrainian,ukr; ur=urdu,urd; uz=uzbek,uzb; vi=vietnamese,vie; yi=yiddish,yid,ji; yo=yoruba,yor;
yue=cantonese; zh=chinese,mandarin,zho,chi,cmn
"""
_OTHER_CODES = """
aa ab ae ak an av ay bi bm ce ch co cr cu cv dv dz ee eo ff fj fy ga gd gn gv ho hz ia ie ig ii ik io iu kg ki kj kl ks
ku kv kw ky lg li lu mh na nd ng nr nv ny oj om or os pi qu rm rn rw sc se sg sm ss st ti tn to ts tw ty ug ve vo wa wo
xh za zu
"""
_COUNTRIES = {"kr": "ko", "jp": "ja", "cn": "zh", "ua": "uk", "cz": "cs", "dk": "da", "gr": "el", "vn": "vi"}
"""Codes of countries that are often written for a language. ``kr`` is Kanuri in ISO 639-1, but hardly ever meant so."""

LANGUAGE_NAMES: dict[str, str] = {}
"""{code: English name in lower case} of the languages that Whisper has."""
_CODES: dict[str, str] = {code: code for code in _OTHER_CODES.split()}
for _entry in re.split(r";\s*", _NAMES.strip()):
    _code, _, _names = _entry.partition("=")
    LANGUAGE_NAMES[_code] = _names.split(",")[0]
    _CODES |= dict.fromkeys((_code, *_names.split(",")), _code)
LANGUAGE_CODES = frozenset(_CODES.values())
"""All codes that ``language_code`` returns."""


def find_code(text: str) -> str:
    """The code of a language by its code, its English name or an older code; "" if the text is none of them."""
    return _CODES.get(text.strip().lower(), "")


def language_code(value: str | None) -> str:
    """``ko``, ``ko-KR``, ``kor``, ``Korean`` -> ``ko``; ``jw`` -> ``jv``; ``nb_NO`` -> ``no``; None and "" -> "".

    Raises:
        BadRow: No language has this code or name (``bad_language``). The message suggests one if it can.
    """
    text = re.split("[-_]", (value or "").strip().lower())[0]
    if text in ("", "auto"):
        return ""
    if code := find_code(text):
        return code
    close = [_COUNTRIES[text]] if text in _COUNTRIES else [_CODES[name] for name in _similar_names(text)]
    hint = f"; did you mean {close[0]!r} ({LANGUAGE_NAMES[close[0]]})?" if close else ""
    known = "write a two-letter code of ISO 639-1, haw, yue, or an English name such as Korean"
    raise BadRow("bad_language", f"language {value!r} is not known{hint or '; ' + known}")


def _similar_names(text: str) -> list[str]:
    return get_close_matches(text, [name for name in LANGUAGE_NAMES.values() if len(text) > 3], 1, 0.8)


NO_LANGUAGE = "the row names no language, which this model needs; give it one, or --language"


def check_language(language: str, known: frozenset[str] | None, model: str) -> None:
    """Check that a model knows a language.

    Args:
        language: A code, or "" if it is unknown.
        known: The codes that the model knows; None if it takes any.
        model: Name of the base model in the message.
    Raises:
        BadRow: It does not (``bad_language``). The message lists the languages that it knows.
    """
    if language and known is not None and language not in known:
        codes = ", ".join(sorted(known))
        raise BadRow("bad_language", f"language {language!r} is none of the {len(known)} that {model} has: {codes}")
