"""Codes of languages, and scripts: which letters a text is written in.

Languages are named by ISO 639-3. Where ISO 639-1 has a two-letter name for several languages taken
together (Arabic, Persian, Chinese, Swahili, Malay), its code is the macrolanguage's: ara, fas, zho,
swa, msa; `macro_of` takes their members there. Script ranges are those of Unicode's blocks.
"""

import re

import numpy as np

_TWO_LETTERS = """
aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel
bg:bul bi:bis bm:bam bn:ben bo:bod br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces cu:chu
cv:chv cy:cym da:dan de:deu dv:div dz:dzo ee:ewe el:ell en:eng eo:epo es:spa et:est eu:eus fa:fas
ff:ful fi:fin fj:fij fo:fao fr:fra fy:fry ga:gle gd:gla gl:glg gn:grn gu:guj gv:glv ha:hau he:heb
hi:hin ho:hmo hr:hrv ht:hat hu:hun hy:hye hz:her ia:ina id:ind ie:ile ig:ibo ii:iii ik:ipk io:ido
is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor
kr:kau ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lub
lv:lav mg:mlg mh:mah mi:mri mk:mkd ml:mal mn:mon mr:mar ms:msa mt:mlt my:mya na:nau nb:nob nd:nde
ne:nep ng:ndo nl:nld nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci oj:oji om:orm or:ori os:oss pa:pan
pi:pli pl:pol ps:pus pt:por qu:que rm:roh rn:run ro:ron ru:rus rw:kin sa:san sc:srd sd:snd se:sme
sg:sag sh:hbs si:sin sk:slk sl:slv sm:smo sn:sna so:som sq:sqi sr:srp ss:ssw st:sot su:sun sv:swe
sw:swa ta:tam te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi
ty:tah ug:uig uk:ukr ur:urd uz:uzb ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:yid yo:yor za:zha
zh:zho zu:zul
"""
_MEMBERS = """
ara:arb,ary,arz,apc,acm,ars,aeb,ajp,acq aze:azj,azb est:ekk,vro fas:pes,prs ful:fuv,fuc,fub
grn:gug,gui kau:knc kom:kpv,koi kon:kng kur:kmr,ckb,sdh lav:lvs,ltg mlg:plt mon:khk msa:zsm
nep:npi,dty nor:nob,nno ori:ory orm:gaz pus:pbu,pbt,pst que:quz,quy sqi:als,aln srd:src swa:swh
uzb:uzn,uzs yid:ydd zha:zyb zho:cmn,yue,wuu,hak,nan,hsn,gan,lzh kok:gom,knn iku:ike
"""
CODES: dict[str, str] = {pair[:2]: pair[3:] for pair in _TWO_LETTERS.split()}
_MACRO = {
    member: group.partition(":")[0]
    for group in _MEMBERS.split()
    for member in group.partition(":")[2].split(",")
}


def code_of(name: str) -> str:
    """The ISO 639-3 code of `en`, `eng` or `eng_Latn`; ValueError where it cannot be one."""
    short = re.split("[-_]", name, maxsplit=1)[0]
    if short in CODES:
        return CODES[short]
    if not re.fullmatch("[a-z]{3}", short):
        raise ValueError(f"{name!r} is no language; write ISO 639-3 codes such as eng or deu")
    return short


def macro_of(code: str) -> str:
    """The macrolanguage an ISO 639-3 code belongs to (`cmn` -> zho), else the code itself."""
    return _MACRO.get(code, code)


# First and last code point of the letters of each script, in hexadecimal.
_RANGES = """
Latin 41-5a 61-7a aa-aa ba-ba c0-24f 1e00-1eff
Greek 370-3ff 1f00-1fff
Cyrillic 400-52f 1c80-1c8f
Armenian 530-58f
Hebrew 590-5ff fb1d-fb4f
Arabic 600-65f 66a-6ef 6fa-6ff 750-77f 8a0-8ff fb50-fdff fe70-fefc
Devanagari 900-965 970-97f
Bengali 980-9e5 9f0-9ff
Gurmukhi a00-a65 a70-a7f
Gujarati a80-ae5 af0-aff
Oriya b00-b65 b70-b7f
Tamil b80-be5
Telugu c00-c65
Kannada c80-ce5
Malayalam d00-d65
Sinhala d80-de5
Thai e00-e4f
Lao e80-ecf edc-edf
Tibetan f00-f1f f40-fff
Myanmar 1000-103f 1050-109f
Georgian 10a0-10ff 1c90-1cbf
Hangul 1100-11ff 3130-318f ac00-d7a3
Ethiopic 1200-139f
Khmer 1780-17df
Kana 3041-30fa 30fc-30ff 31f0-31ff ff66-ff9f
Han 3005-3007 3400-4dbf 4e00-9fff f900-faff 20000-323af
"""
SCRIPTS = ("", *(line.split()[0] for line in _RANGES.strip().splitlines()))


def _edges() -> tuple[np.ndarray, np.ndarray]:
    """Where ranges begin and end, sorted, and the number of the script from each edge on."""
    marks: list[tuple[int, int]] = [(0, 0)]
    for number, line in enumerate(_RANGES.strip().splitlines(), 1):
        for span in line.split()[1:]:
            first, last = (int(point, 16) for point in span.split("-"))
            marks += [(first, number), (last + 1, 0)]
    # A range that begins where another ends comes after that end.
    starts: dict[int, int] = {}
    for point, number in sorted(marks):
        starts[point] = max(number, starts.get(point, 0))
    points = sorted(starts)
    return np.array(points, np.uint32), np.array([starts[point] for point in points], np.intp)


_EDGES, _NUMBERS = _edges()


def letters_by_script(text: str) -> dict[str, int]:
    """How many letters (with their marks) of each script a text has; other characters not."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
    numbers = _NUMBERS[np.searchsorted(_EDGES, points, side="right") - 1]
    counts = np.bincount(numbers, minlength=len(SCRIPTS))
    return {SCRIPTS[i]: int(counts[i]) for i in np.flatnonzero(counts) if i}
