"""Language identification without network: by script where that decides, else by py3langid.

Each document gets a language and a score, as in Llama 3 (section 3.1.1) and CCNet. Up to seven
stretches of 300 characters, spread over the text, are looked at, and most letters win; three that
agree are enough. Malay and Indonesian, which the model mixes up, are told apart by words that only
one of them has. Yiddish, Tigrinya, Cantonese count as Hebrew, Amharic, Chinese.
"""

import dataclasses
import re

from moebius.curate.document import Document, Dropped, Kind
from moebius.curate.languages import code_of, letters_by_script, macro_of
from moebius.curate.step import Decide, Decision, Filter

STRETCH = 300
MOST_STRETCHES = 7
# The order in which stretches are read: the first three lie far apart.
_ORDER = (0, 3, 6, 1, 5, 2, 4)
UNKNOWN = "zxx"

# Scripts that one language, or nearly only one, is written in.
DECIDES = {
    "Armenian": "hye",
    "Hebrew": "heb",
    "Gurmukhi": "pan",
    "Gujarati": "guj",
    "Oriya": "ori",
    "Tamil": "tam",
    "Telugu": "tel",
    "Kannada": "kan",
    "Malayalam": "mal",
    "Sinhala": "sin",
    "Thai": "tha",
    "Lao": "lao",
    "Tibetan": "bod",
    "Myanmar": "mya",
    "Georgian": "kat",
    "Hangul": "kor",
    "Ethiopic": "amh",
    "Khmer": "khm",
    "Kana": "jpn",
    "Han": "zho",
}
# What the model may answer for the scripts that several languages share; all its others are Latin.
_SHARED = {
    "Greek": "el grc",
    "Cyrillic": "ba be bg kk ky mk mn ru sr tg tt uk uz",
    "Arabic": "ar ary arz fa ps sdh ug ur uzs",
    "Devanagari": "gom hi mr ne sa",
    "Bengali": "as bn",
}
_NOT_LATIN = """
am ar ary arz as ba be bg bn dz el fa grc gu hbo he hi hy ja ka km kn ko ky lo mk ml mn mr my ne
or pa ps ru sa sdh si ta te tg th ug uk ur uzs wuu yue zh
"""
# A letter of these says as much as several of an alphabet.
_WEIGHT = {"Han": 3, "Kana": 3, "Hangul": 2}
# Japanese text has at least this share of kana among its Han characters and kana.
_KANA_SHARE = 0.05
_ADDRESS = re.compile(r"(?:https?://|www\.)\S{1,2000}|\S{1,64}@\S{1,64}")

_INDONESIAN = """
agustus aktivitas akuntansi anda apakah apapun bagian bahwa beda berbagai berbeda berkas berupa
bisa butir butuh coba cocok daftar desember didukung dikarenakan diperbolehkan fakultas gampang
gereja hapus harus hukum informasi istri jadwal jelek juli juni kabupaten kantor karena kebijakan
kesehatan kode kualitas lainnya laki langsung layanan lunak maret mau memiliki mencoba
mengembalikan menurut mobil nomor otomatis panggilan pelayanan pemerintah pengadilan penghapusan
peradilan perangkat peringatan perusahaan pesan polisi presiden pribadi produk provinsi publik
punya putra rahasia resmi rusak saat saja sandi sebelumnya seluruh sepeda setelah siapapun standar
suatu tapi televisi tentang tingkat uang ujian universitas wajar waktu yaitu yakni
"""
_MALAY = """
ahli akaun aktiviti amaran anugerah awam bagaimanapun bahagian baharu bahawa basikal berbeza
bererti cuba dibenarkan disember fakulti filem hadapan hendaklah iaitu ialah isteri jadual julai
kaedah kakitangan kanak kandungan kedudukan kemudahan kerana kerjasama kesihatan kualiti laluan
lelaki mahkamah mahu maklumat manakala menerusi mengandungi mengikut mesti mestilah muzik nombor
ogos pejabat pelajar pelbagai peribadi perkhidmatan perlembagaan polis putera rahsia rasmi rosak
sahaja saiz samada sebarang sekiranya selepas semasa sempadan semula senarai sentiasa sesiapa
syarikat tamat televisyen tempatan tempoh tetingkap tiada universiti wang wujud
"""
_ONLY_INDONESIAN = frozenset(_INDONESIAN.split())
_ONLY_MALAY = frozenset(_MALAY.split())
# Where no such word speaks, what the model must give Malay: there is far less of it on the web.
_MALAY_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Language(Filter):
    """Names each document's language; keeps those in `keep` (all where empty).

    `keep` takes ISO 639-1 and 639-3 codes; a macrolanguage stands for all its members. `min_score`
    is the least share, 0 to 1, of what was read that must be in the language, each stretch
    weighed by the model's probability.
    """

    keep: tuple[str, ...] = ()
    min_score: float = 0.0
    kinds: tuple[Kind, ...] = ("web", "prose")

    def __post_init__(self) -> None:
        for name in self.keep:
            code_of(name)
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is a share, 0 to 1, not {self.min_score}")

    def build(self) -> Decide:
        identifier = Identifier()
        reachable = identifier.languages | {macro_of(code) for code in identifier.languages}
        kept = {_nearest(code_of(name), reachable) for name in self.keep}

        def decide(document: Document) -> Decision:
            language, score = identifier.identify(document.text)
            if kept and not kept & {language, macro_of(language)}:
                return Dropped("other language", f"{language} {score:.2f}")
            if score < self.min_score:
                return Dropped("uncertain language", f"{language} {score:.2f}")
            named = dataclasses.replace(document, language=language)
            return named.with_score("language", score)

        return decide


def _nearest(code: str, reachable: set[str]) -> str:
    """A code as texts can be found to be in: itself, or the macrolanguage it belongs to."""
    for name in (code, macro_of(code)):
        if name in reachable:
            return name
    raise ValueError(f"keep: no text is ever found to be in {code!r}; leave it out")


class Identifier:
    """The model and the rules around it. Not for several threads at once."""

    def __init__(self) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise ValueError(
                "the step language needs the curate extra: pip install 'moebius[curate]'"
            ) from None
        self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        labels = set(self._model.labels)
        self._allowed = {script: frozenset(names.split()) for script, names in _SHARED.items()}
        self._allowed["Latin"] = frozenset(labels.difference(_NOT_LATIN.split()))
        answers = frozenset().union(*self._allowed.values()) & labels
        self.languages = {*(code_of(label) for label in answers), *DECIDES.values()}

    def identify(self, text: str) -> tuple[str, float]:
        """The ISO 639-3 code of a text's language (zxx: no language) and its score, 0 to 1."""
        votes: dict[str, float] = {}
        weights: dict[str, int] = {}
        total = 0
        for number, stretch in enumerate(stretches(text)):
            language, probability, weight = self._of_stretch(stretch)
            votes[language] = votes.get(language, 0.0) + probability * weight
            weights[language] = weights.get(language, 0) + weight
            total += weight
            if number == 2 and len(weights) == 1 and language != UNKNOWN:
                break
        if not total:
            return UNKNOWN, 0.0
        best = max(sorted(weights), key=lambda name: weights[name])
        return best, round(votes[best] / total, 3)

    def _of_stretch(self, stretch: str) -> tuple[str, float, int]:
        """Language, probability and weight (letters) of one stretch; no weight without letters."""
        if "://" in stretch or "www." in stretch or "@" in stretch:
            stretch = _ADDRESS.sub(" ", stretch)
        counts = letters_by_script(stretch)
        if not counts:
            return UNKNOWN, 0.0, 0
        weighed = {script: n * _WEIGHT.get(script, 1) for script, n in counts.items()}
        total = sum(weighed.values())
        east = weighed.get("Kana", 0) + weighed.get("Han", 0)
        if weighed.get("Kana", 0) >= max(1, _KANA_SHARE * east):
            weighed["Kana"], weighed["Han"] = east, 0
        script = max(sorted(weighed), key=lambda name: weighed[name])
        if script in DECIDES:
            return DECIDES[script], weighed[script] / total, total
        language, probability = self._by_model(stretch, script)
        return language, probability * weighed[script] / total, total

    def _by_model(self, stretch: str, script: str) -> tuple[str, float]:
        allowed = self._allowed[script]
        ranked = [(name, share) for name, share in self._model.rank(stretch) if name in allowed]
        if not ranked:
            return UNKNOWN, 0.0
        best, share = ranked[0]
        total = sum(part for _, part in ranked)
        if {name for name, _ in ranked[:2]} == {"id", "ms"}:
            malay = share if best == "ms" else ranked[1][1]
            share += ranked[1][1]
            best = "ms" if is_malay(stretch, malay / share) else "id"
        return code_of(best), share / total if total else 0.0


def stretches(text: str) -> list[str]:
    """Parts of a text to look at: all of it up to seven stretches, above that evenly spread."""
    count = min(MOST_STRETCHES, -(-len(text) // STRETCH))
    if count <= 1:
        return [text]
    if len(text) <= STRETCH * MOST_STRETCHES:
        starts = [i * len(text) // count for i in range(count)]
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    starts = [i * (len(text) - STRETCH) // (count - 1) for i in range(count)]
    return [text[starts[i] : starts[i] + STRETCH] for i in _ORDER]


def is_malay(text: str, share: float) -> bool:
    """Malay rather than Indonesian, by words of the one alone; else by the model's `share`."""
    found = re.findall(r"[a-z]+", text.lower())
    words = sum((word in _ONLY_MALAY) - (word in _ONLY_INDONESIAN) for word in found)
    return words > 0 or (words == 0 and share > _MALAY_SHARE)
