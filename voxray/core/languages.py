"""Codes and names of languages. A language has one code here, however a manifest or a flag writes it.

The codes are those of ISO 639-1, and of ISO 639-3 for Hawaiian and Cantonese, which Whisper has. Tests compare the
names with Whisper's own table.
"""

import re
from difflib import get_close_matches

from voxray.core.errors import BadRow

_WHISPER = """
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
_OTHER = """
aa=afar; ab=abkhazian; ae=avestan; ak=akan; an=aragonese; av=avaric; ay=aymara; bi=bislama; bm=bambara; ce=chechen;
ch=chamorro; co=corsican; cr=cree; cu=church slavonic; cv=chuvash; dv=divehi; dz=dzongkha; ee=ewe; eo=esperanto;
ff=fulah; fj=fijian; fy=western frisian; ga=irish; gd=scottish gaelic; gn=guarani; gv=manx; ho=hiri motu; hz=herero;
ia=interlingua; ie=interlingue; ig=igbo; ii=sichuan yi; ik=inupiaq; io=ido; iu=inuktitut; kg=kongo; ki=kikuyu;
kj=kuanyama; kl=greenlandic; ks=kashmiri; ku=kurdish; kv=komi; kw=cornish; ky=kyrgyz; lg=ganda; li=limburgish;
lu=luba; mh=marshallese; na=nauruan; nd=north ndebele; ng=ndonga; nr=south ndebele; nv=navajo; ny=chichewa; oj=ojibwe;
om=oromo; or=odia; os=ossetian; pi=pali; qu=quechua; rm=romansh; rn=rundi; rw=kinyarwanda; sc=sardinian;
se=northern sami; sg=sango; sm=samoan; ss=swati; st=southern sotho; ti=tigrinya; tn=tswana; to=tongan; ts=tsonga;
tw=twi; ty=tahitian; ug=uyghur; ve=venda; vo=volapük; wa=walloon; wo=wolof; xh=xhosa; za=zhuang; zu=zulu
"""
_COUNTRIES = {"kr": "ko", "jp": "ja", "cn": "zh", "ua": "uk", "cz": "cs", "dk": "da", "gr": "el", "vn": "vi"}
"""Codes of countries that are often written for a language. ``kr`` is Kanuri in ISO 639-1, but hardly ever meant so."""

_NAMES = {
    code: names.split(",")
    for code, _, names in (entry.partition("=") for entry in re.split(r";\s*", f"{_WHISPER.strip()}; {_OTHER.strip()}"))
}
"""{code: its names and older codes, the English name first} in lower case."""
_CODES = {name: code for code, names in _NAMES.items() for name in (code, *names)}
LANGUAGE_NAMES = {code: names[0] for code, names in list(_NAMES.items())[: _WHISPER.count("=")]}
"""{code: English name in lower case} of the languages that Whisper has."""
LANGUAGE_CODES = frozenset(_CODES.values())
"""All codes that ``language_code`` returns."""


def find_code(text: str) -> str:
    """The code of a language by its code, its English name or an older code; "" if the text is none of them."""
    return _CODES.get(text.strip().lower(), "")


def language_code(value: str | None, key: str = "language") -> str:
    """``ko``, ``ko-KR``, ``kor``, ``Korean`` -> ``ko``; ``jw`` -> ``jv``; ``nb_NO`` -> ``no``; None and "" -> "".

    Args:
        key: Name of the value in the message.
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
    raise BadRow("bad_language", f"{key} {value!r} is not known{hint or '; ' + known}")


def language_name(value: str | None, key: str = "language") -> str:
    """English name of a language in any of its forms: ``ko-KR`` -> ``Korean``; "" for None, "" and ``auto``.

    Args:
        key: Name of the value in the message.
    Raises:
        BadRow: As ``language_code``.
    """
    code = language_code(value, key)
    return _NAMES[code][0].title() if code else ""


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
