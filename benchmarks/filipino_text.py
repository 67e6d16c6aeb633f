#!/usr/bin/env python3
"""Made-up Filipino, as much as you like: python benchmarks/filipino_text.py --mb 100 --out FILE

Roots are inflected as Tagalog's are (-um- and mag- verbs in three aspects, -in-, -an, pinag- … -an, reduplication,
degrees of adjectives) and stand in the slots of sentences. Few sentences make sense; what tokenising and its benchmarks
need is words of such parts, a few of them frequent and most of them rare (made-up roots). The same seed gives the same
bytes.

--format jsonl (default)   a document a line: {"text": …}
--format txt               documents with a blank line between them
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

UM = """kain bili basa sulat inom takbo lakad punta alis dating upo tayo tawa iyak ngiti sayaw kanta hanap kuha
gawa tulong sama pasok labas akyat baba lipad langoy tingin sagot tanong sigaw bulong sunod umpisa hiram putol
tawag sakay tulog pili sira isip lapit ikot balik hinto tigil bangon hukay kagat halik yakap hingi bunot pitas
talon sipa suntok higa luhod yuko tawid sulong urong unlad kilos galaw laban sali abot gamit salo sukat timbang
tikim subok ubo""".split()
MAG = """luto laro aral trabaho turo linis laba walis tanim ani benta usap dala bigay lagay tago ayos handa
hugas simba dasal bayad ipon tapon buhos sara bukas kuwento saing ihaw prito gupit tahi habi pinta guhit ingat
alaga bantay pasyal lakbay biyahe igib kalat hintay isda dilig ligpit balot hati sabi sumbong pahinga tiyaga""".split()
NOUNS = """bahay bata lalaki babae guro aso pusa kalabaw manok ibon puno bulaklak bundok dagat ilog lawa pulo
bayan lungsod nayon kalye palengke paaralan ospital aklat lapis papel mesa silya pinto bintana kusina kwarto
bubong pader hagdan damit sapatos sombrero payong tinapay kanin ulam gulay prutas mangga saging niyog tubig
gatas kape asukal asin suka mantika baboy baka itlog araw buwan bituin langit ulap hangin ulan bagyo apoy lupa
bato buhangin ginto pilak pera negosyo tindahan bangko sasakyan kotse bangka eroplano tren bisikleta kamay paa
ulo mata tenga ilong bibig ngipin buhok puso dugo buto kaibigan kapatid ina ama anak lolo lola tito tita pinsan
asawa kapitbahay pangulo alkalde pulis sundalo doktor nars magsasaka mangingisda karpintero awit tula pista
pasko regalo laruan bola salamin orasan telepono balita batas wika salita dahilan problema umaga hapon gabi taon
linggo panahon lugar mundo buhay pangalan larawan pelikula kanto tulay gubat bukid palay mais kamote sili
sibuyas bawang luya kambing daga langgam gagamba paruparo bubuyog""".split()
QUALITIES = """ganda bait laki liit taas haba ikli lakas hina bilis bagal init lamig tamis asim alat pait dumi
saya lungkot talino tapang sipag yaman hirap mura tigas lambot lalim babaw lawak kitid bigat gaan linaw labo
dilim liwanag bango baho sarap ingay gulo payapa ayos tanda dami kapal nipis tulin tatag husay galing buti sama
lusog payat taba puti itim pula dali hinahon hiya inggit""".split()
NAMES = """Ana Ben Carla Dante Elena Fidel Gina Hernan Ines Jose Karla Lito Maria Nena Oscar Pedro Rosa Santi Tess
Victor Kardo Jun Luz""".split()
PLACES = (
    """Maynila Cebu Davao Baguio Iloilo Bohol Palawan Batangas Laguna Bicol Vigan Marikina Pasig Tagaytay""".split()
)
LITTLE = "na pa po rin daw ba naman lang muna talaga sana pala".split()
WHEN = "kahapon, ngayon, bukas, kanina, tuwing umaga, noong isang linggo, gabi-gabi, araw-araw, palagi".split(", ")
RARE = 5000  # made-up roots among nouns, verbs and qualities, each
RARE_SHARE = 0.15  # of the nouns, verbs and qualities of a text
NUMBERS = "dalawang, tatlong, apat na, limang, sampung, 12, 100, 3,500".split(", ")

SENTENCES = """
{done} si {name} sa {place} {when}.
{now} ang {noun} ng {noun} habang {now} ang mga {noun}.
{will} {little} ako ng {noun} para sa {noun}.
{object_done} ni {name} ang {quality} {noun}.
{object_now} nila ang {noun} sa {place}.
{object_will} natin ang {noun} at {command} ang {noun}.
Bakit {object_done} mo ang {noun}?
{command} mo {little} ang {noun}!
{most} {noun} ang {noun} sa {place}.
{very} ng {noun} kaya {done} {little} kami.
Ang {gerund} ng {noun} ay {very} para kay {name}.
Ang {state} ng {noun} ay {object_now} ng mga {noun}.
Mga {plural} {noun} ang {place_done} ng {noun}.
{social} siya sa mga {noun} upang {able} ng {noun}.
{cause_done} ni {name} ang {noun} sa {worker} ng {place}.
{become} ang {noun} dahil sa {gerund} nina {name} at {name}.
Sabi ni {name}, "{command} {little} natin ang {noun}, {name}."
Hindi {able} ang {noun} kung walang {noun} sa {noun}.
Noong {year}, {done} ang {number} {noun} mula {place} hanggang {place}.
May {number} {noun} sa {noun}, ngunit {now} pa rin ang {worker}.
{study} namin ang {noun} at ang {state} nito.
{again} lang siya nang {again} hanggang {done} ang {noun}.
Kung {will} ang {noun}, {will} din ang {noun}; kung hindi, {will} si {name}.
"""


def first_syllable(root: str) -> str:
    """What reduplication repeats: the first consonant (ng is one) and vowel: la of laro, nga of ngatngat, a of alis."""
    consonant = "ng" if root.startswith("ng") else "" if root[0] in "aeiou" else root[0]
    return consonant + next(letter for letter in root if letter in "aeiou")


def again(root: str) -> str:
    return first_syllable(root) + root


def infixed(root: str, infix: str) -> str:
    """kain → kumain, alis → umalis; -in- of luto is niluto."""
    if infix == "in" and root[0] in "lrwy":
        return "ni" + root
    start = 2 if root.startswith("ng") else 0 if root[0] in "aeiou" else 1
    return root[:start] + infix + root[start:]


def suffixed(root: str, suffix: str) -> str:
    """basa → basahin, luto → lutuin, tulong → tulungan, lakad → lakarin."""
    if root[-1] == "d":
        root = root[:-1] + "r"
    last = max(root.rfind(vowel) for vowel in "aeiou")
    if root[last] == "o":
        root = root[:last] + "u" + root[last + 1 :]
    return root + ("h" if root[-1] in "aei" else "") + suffix


def prefixed(prefix: str, root: str) -> str:
    """magluto, but mag-aral."""
    return prefix + ("-" if prefix[-1] not in "aeiou" and root[0] in "aeiou" else "") + root


def linked(word: str) -> str:
    """With the linker before what follows: magandang, bagong, matamis na."""
    return word + "ng" if word[-1] in "aeiou" else word + "g" if word[-1] == "n" else f"{word} na"


def verb_forms(root: str, um: bool) -> dict[str, str]:
    """Slot of a sentence → the verb in it."""
    mag = not um
    return {
        "done": prefixed("nag", root) if mag else infixed(root, "um"),
        "now": prefixed("nag", again(root)) if mag else infixed(again(root), "um"),
        "will": prefixed("mag", again(root)) if mag else again(root),
        "object_done": infixed(root, "in"),
        "object_now": infixed(again(root), "in"),
        "object_will": suffixed(again(root), "in"),
        "command": suffixed(root, "in"),
        "place_done": suffixed(infixed(root, "in"), "an"),
        "study": prefixed("pinag", suffixed(root, "an")),
        "gerund": prefixed("pag", again(root) if mag else root),
        "social": prefixed("nakipag", root),
        "able": prefixed("makapag", root) if mag else prefixed("maka", root),
        "cause_done": "pina" + root,
        "worker": "taga" + root,
        "again": root,
    }


def quality_forms(root: str) -> dict[str, str]:
    return {
        "quality": linked("ma" + root),
        "most": linked("pinakama" + root),
        "very": "napaka" + root,
        "plural": linked("ma" + again(root)),
        "state": "ka" + suffixed(root, "an"),
        "become": infixed(root, "um"),
    }


def made_up_roots(seed: int) -> list[str]:
    """RARE roots of two syllables that may or may not exist, such as `linsay`."""
    draw, found = random.Random(seed), dict[str, None]()
    while len(found) < RARE:
        first, second = (
            draw.choice("b d g h k l m n p r s t w y ng".split()) + draw.choice("aaiiou") for _ in range(2)
        )
        found[first + draw.choice(["", "", "n", "m", "s"]) + second + draw.choice(["", *"tksnlyg"])] = None
    return list(found)


@cache
def words() -> dict[str, tuple[list[str], list[str]]]:
    """Slot → (words for it, the frequent ones first; rare words for it)."""
    verbs = [verb_forms(root, True) for root in UM] + [verb_forms(root, False) for root in MAG]
    random.Random(0).shuffle(verbs)
    rare_verbs = [verb_forms(root, number % 2 == 0) for number, root in enumerate(made_up_roots(1))]
    rare_qualities = map(quality_forms, made_up_roots(2))
    years = [str(year) for year in range(2026, 1890, -1)]
    lists = {"name": NAMES, "place": PLACES, "little": LITTLE, "when": WHEN, "number": NUMBERS, "year": years}
    found = {slot: (choices, choices) for slot, choices in lists.items()} | {"noun": (NOUNS, made_up_roots(3))}
    for rare, all_forms in enumerate([[*verbs, *map(quality_forms, QUALITIES)], [*rare_verbs, *rare_qualities]]):
        for forms in all_forms:
            for slot, word in forms.items():
                found.setdefault(slot, ([], []))[rare].append(word)
    return found


def documents(seed: int = 0) -> Iterator[str]:
    """Documents without end: 1 to 400 sentences (12 in the middle, log-normal), a paragraph of 2 to 7 a line."""
    draw, forms = random.Random(seed), words()
    # A sentence is text, slot, text, slot, …, text.
    templates = [re.split(r"\{(\w+)\}", line) for line in SENTENCES.strip().splitlines()]
    while True:
        paragraphs, left = [], min(400, max(1, round(draw.lognormvariate(2.5, 0.9))))
        while left > 0:
            count = min(left, draw.randint(2, 7))
            paragraphs.append(" ".join(_sentence(draw, templates, forms) for _ in range(count)))
            left -= count
        yield "\n".join(paragraphs)


def _sentence(draw: random.Random, templates: list[list[str]], forms: dict[str, tuple[list[str], list[str]]]) -> str:
    parts = list(draw.choice(templates))
    for at in range(1, len(parts), 2):
        frequent, rare = forms[parts[at]]
        if draw.random() < RARE_SHARE:
            parts[at] = draw.choice(rare)
        else:
            parts[at] = frequent[int(len(frequent) * draw.random() ** 2)]  # the k-th word's share falls as 1/√k
    text = "".join(parts)
    return text[0].upper() + text[1:]


def write(path: Path, size: int, form: str, seed: int) -> int:
    """Documents until the file has `size` bytes; returns their number."""
    written = count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in documents(seed):
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n" if form == "jsonl" else text + "\n\n"
            file.write(line)
            written, count = written + len(line.encode()), count + 1
            if written >= size:
                return count
    raise AssertionError("documents never end")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mb", type=float, required=True, help="at least so many million bytes, the last document whole"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", choices=["jsonl", "txt"], default="jsonl")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = write(options.out, round(options.mb * 1e6), options.format, options.seed)
    print(json.dumps({"file": str(options.out), "documents": count, "bytes": options.out.stat().st_size}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
