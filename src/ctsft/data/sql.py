"""The built-in data set `sql`: questions in English about many small database schemas, and the SQL that answers them.

Every example has its own small database, so a prediction is scored by what it returns, not by how it is spelled
(execution accuracy; Zhong, Xiong and Socher 2017, arXiv:1709.00103). The held-out domains share no table name with the
training domains. An example is kept only where its rows can tell right from wrong: the answer is not empty, holds no
NULL, does not hang on a tie, and changes when a clause is dropped or turned around.
"""

import contextlib
import math
import random
import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ctsft.errors import CTError

Split = Literal["train", "heldout"]
Row = tuple[Any, ...]
Asked = tuple[str, str]  # question, SQL

MAX_EXAMPLES = 50_000
MAX_ROWS = 1_000
TIME_LIMIT = 1.0  # seconds

# One domain is three lines: its name, the parent table, and the child table, which refers to the parent. A table is
# `plural singular` (a child adds the preposition that links it to its parent) and then its columns; the first one is
# the label that names a row. A trailing ? allows NULL.
#   name:person    text, all different, as `_text` makes it            country        text, one of POOLS
#   kind=a|b|c     text, one of these                                  released@      date; the word is a participle
#   pages#90-900   integer, counted: "more than 300 pages"             price$5.00-60.00   number that can be summed
#   age~20-70      number that is only measured: "an age above 30"     (decimals as written in the range)
DOMAINS: dict[Split, str] = {
    "train": """
library
authors author name:person country award=Booker|Hugo|Nebula|Orwell? age~25-90 followers#100-9000
books book by title:work genre=fantasy|history|poetry|crime pages#90-900 price$5.00-60.00 published@ rating~1.0-5.0?

school
teachers teacher name:person subject=math|music|physics|art age~24-65 salary$30000-80000 hired@
students student of name:person city absences#0-40 score~10.0-99.0 club=chess|drama|robotics? enrolled@

clinic
doctors doctor name:person specialty=surgery|cardiology|pediatrics salary$60000-190000 hired@ phone:phone?
patients patient of name:person city age~1-95 weight~40-120? visits#1-40 admitted@ discharged@?

farm
farmers farmer name:person region=north|south|east|west age~22-80 tractors#1-30 email:email?
fields field of name:place crop=wheat|corn|barley|oats area~1.0-90.0 harvest$10-900? trees#0-99 sown@

restaurant
restaurants restaurant name:firm city cuisine=Thai|Italian|Mexican|Greek rating~1.0-5.0? tables#5-60 opened@
dishes dish at name:Soup|Curry|Pie|Salad course=main|dessert|side price$4.00-40.00 calories#90-900 added@ served@?

cinema
directors director name:person country age~25-85 awards#0-40 agency=Apex|Lumen|Orbit?
movies movie by title:work genre=drama|comedy|horror|thriller budget$1-200 duration~70-220 released@ rating~1.0-9.9?

music
singers singer name:person country voice=tenor|alto|bass|soprano age~18-80 manager:person?
albums album by title:work style=jazz|rock|folk|soul tracks#5-40 price$6.00-40.00 released@ score~10-100?

shop
suppliers supplier name:firm country rating~1.0-5.0? orders#10-900 contracted@
products product from name:Lamp|Desk|Kettle|Mug category=kitchen|office|garden price$3-300 stock$0-500 color? launched@

hotel
hotels hotel name:place city rating~1.0-5.0 rooms#20-400 renovated@? manager:person?
bookings booking at guest:person package=basic|breakfast|full nights#1-30 price$50-2500 made@ paid@?

sports
teams team name:place league=premier|national|regional wins#0-60 coach:person? budget$1-300 founded@
players player of name:person position=goalkeeper|defender|striker age~17-40 goals#0-60 salary$20-900? signed@

company
offices office name:place city floor~1-40 desks#10-300 rent$1000-30000? opened@
employees employee at name:person role=engineer|analyst|clerk salary$30000-120000 age~20-66 hired@ bonus$100-900?

bank
customers customer name:person city segment=private|business|student income$15000-150000 phone:phone? joined@
accounts account of code:code type=savings|checking|joint balance$10-9000 rate~0.1-6.0? transfers#0-200 opened@ closed@?

garage
owners owner name:person city age~18-85 phone:phone? discount~1-30?
cars car of plate:code brand=Fiat|Volvo|Toyota|Skoda color mileage~5000-200000 price$900-40000 bought@ inspected@?

gym
trainers trainer name:person sport=yoga|boxing|spinning|pilates age~20-60 fee$15-120 certified@?
members member with name:person level=beginner|intermediate|advanced age~16-80 sessions#1-150 weight~45-120? registered@

bakery
bakers baker name:person city shift=morning|evening|night wage$12.00-40.00 hired@ email:email?
cakes cake by name:Tart|Muffin|Pie flavor=lemon|vanilla|cherry price$2.00-60.00 layers#1-20 weight~0.2-6.0? baked@

garden
gardens garden name:place city style=formal|wild|alpine area~50-5000 visitors#100-9000? opened@
plants plant in name:Fern|Rose|Lily|Sage color height~5-400 price$2-80? leaves#3-300 season=spring|summer|fall planted@

newspaper
journalists journalist name:person country beat=politics|science|culture age~22-70 followers#100-9000 phone:phone?
articles article by title:work section=world|local|opinion words#200-4000 clicks#50-9000 published@ corrected@?

games
studios studio name:firm country employees#5-900 revenue$1-500? founded@
games game by title:work genre=puzzle|racing|strategy|arcade price$1.00-70.00 levels#5-200 score~10-100? released@

software
developers developer name:person city language age~18-65 commits#10-9000 email:email?
apps app by name:Notes|Maps|Mail platform=android|ios|web size~1-400 price$0.50-30.00? downloads#10-9000 updated@

realty
agents agent name:person city commission~1.0-9.0 deals#1-200 licensed@ phone:phone?
houses house of address:street type=villa|cottage|bungalow price$90-900 bedrooms#1-20 size~40-500? listed@ sold@?

charity
charities charity name:firm country cause=water|health|education volunteers#10-900 founded@ website:site?
donations donation to donor:person method=card|cash|transfer amount$5-5000 fee$0.10-9.00? received@ acknowledged@?

theater
theaters theater name:place city seats#80-2000 director:person? built@
plays play at title:work genre=tragedy|comedy|musical acts#1-20 price$10.00-120.00 length~40-240? premiered@

university
professors professor name:person faculty=law|medicine|arts|science age~30-75 papers#5-300 hired@ office:code?
courses course by title:work level=bachelor|master|doctoral credits#1-30 fee$100-3000 capacity~10-300? approved@

kennel
breeders breeder name:person country kennels#1-40 age~20-80 licensed@ website:site?
dogs dog from name:pet breed=beagle|poodle|collie|boxer color weight~2.0-70.0 price$100-3000 vaccinated@? born@

harbor
harbors harbor name:place country depth~4-60 cranes#1-60 opened@
ships ship in name:work type=tanker|ferry|trawler length~20-400 passengers#3-900 cabins#2-300? built@ repaired@?

observatory
astronomers astronomer name:person country age~24-90 papers#1-300 institute=Keck|Palomar|Lick?
comets comet of name:code class=short|long|great period~3.0-400.0? tails#1-20 magnitude~1-20 discovered@

insurance
clients client name:person city job=pilot|cook|nurse|farmer age~18-90 claims#0-40 email:email?
policies policy of code:code type=home|travel|life|pet premium$50-3000 renewals#0-30 signed@ cancelled@?

rental
landlords landlord name:person city age~30-85 buildings#1-40 phone:phone?
apartments apartment of address:street heating=gas|electric|solar rent$300-4000 windows#1-30 size~20-200 built@ rented@?

fashion
designers designer name:person country age~20-75 shows#1-90 label=Moda|Vero|Luce?
dresses dress by name:Gown|Tunic|Wrap|Shift fabric=silk|cotton|linen|wool color price$20-900 buttons#0-40 sold@? sewn@

concerts
venues venue name:place city capacity~100-9000 bars#1-30 rent$200-9000? opened@
concerts concert at title:work genre=rock|opera|blues|techno price$10-150 songs#8-50 sponsor=Zenit|Sol? announced@

bridges
rivers river name:place country length~50-3000 dams#0-40 depth~2.0-60.0?
bridges bridge over name:place material=steel|stone|wood|concrete length~20-2000 lanes#1-20 cost$1-400? opened@

hiking
guides guide name:person country language age~20-70 climbs#3-300 phone:phone?
hikes hike with name:place difficulty=easy|medium|hard distance~2.0-60.0 price$10-300 huts#0-20 scheduled@ cancelled@?
""",
    "heldout": """
airline
airlines airline name:firm country planes#5-400 rating~1.0-5.0? founded@
flights flight of code:code destination=Rome|Tokyo|Cairo|Lima seats#60-400 fare$40-1500 distance~200-9000? scheduled@

museum
museums museum name:place city visitors#100-9000 fee$2.00-30.00? opened@ director:person?
paintings painting in title:work technique=oil|watercolor|tempera value$5-900 height~20-300 painted@ restored@?

zoo
zoos zoo name:place country area~5-300 keepers#5-200 fee$5.00-40.00? opened@
animals animal in name:pet kind=lion|zebra|otter|panda age~1-40 weight~3-900? teeth#10-60 born@ examined@?

brewery
breweries brewery name:firm country tanks#2-60 output$10-900 founded@ website:site?
beers beer from name:work style=lager|stout|porter strength~2.0-12.0 price$1.00-15.00 reviews#5-900 brewed@ sold@?

hospital
hospitals hospital name:place city beds#30-900 budget$5-500? opened@
nurses nurse at name:person ward=surgery|oncology|maternity age~21-65 salary$20000-60000 shifts#3-60 hired@ certified@?

winery
vineyards vineyard name:place region=coast|valley|hills|plateau altitude~10-900 hectares#3-200 owner:person? planted@
wines wine from name:work grape=merlot|riesling|syrah|malbec price$5.00-90.00 bottles#50-9000 score~60-100? bottled@

podcast
hosts host name:person country age~18-75 sponsors#1-40 microphone=Rode|Shure|Neumann?
episodes episode by title:work topic=travel|crime|food duration~10-180 listeners#100-9000 rating~1.0-5.0? recorded@

railway
stations station name:place city platforms#1-40 elevation~5-900? built@ manager:person?
trains train from code:code type=express|local|freight wagons#2-60 speed~60-320 fare$3.00-120.00? serviced@

law
lawyers lawyer name:person city specialty=tax|patent|family|labor rate$80-600 wins#0-200 phone:phone?
lawsuits lawsuit of code:code court=civil|criminal|appeal cost$10-900 witnesses#0-30 duration~5-400? filed@ settled@?

robotics
labs lab name:firm country engineers#3-200 budget$10-900 founded@ sponsor=Axon|Delta|Rhine?
robots robot from name:Rover|Arm|Drone task=welding|cleaning|mapping weight~1-300 sensors#2-60 price$10-900? built@

beekeeping
beekeepers beekeeper name:person country age~20-85 suits#1-30 email:email?
hives hive of name:code location=forest|meadow|roof|orchard frames#4-40 yield$1-90 weight~5-90? installed@ treated@?

space
agencies agency name:firm country budget$10-900 launches#1-200 founded@ website:site?
satellites satellite of name:code orbit=low|medium|polar mass~20-6000 antennas#1-30 cost$5-900? launched@ retired@?
""",
}

FIRST = (
    "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karin Liam Maria Noah Olga Peter Rosa Simon Tara Victor"
)
LAST = (
    "Adams Berg Costa Dunn Evans Fischer Garcia Hill Ito Jensen Kowal Lopez Moore Novak O'Neill Park Quinn Rossi Silva"
)
ADJECTIVE = "Silent Golden Broken Hidden Winter Crimson Distant Lonely Electric Secret Northern Paper Burning Quiet"
NOUN = "River Garden Mirror Voyage Harvest Shadow Island Letter Engine Harbor Crown Forest Signal Window"
PREFIX = "Oak Ash River Stone Maple Green White West High Clear Fair Spring"
SUFFIX = "field ford ton brook dale wood haven bridge"
FIRM = "Vega Norda Solis Altura Brava Corvus Delmar Ember Fjord Halcyon Ivora Juno Kestrel Lumina Mistral Onda Pinnacle"
PET = "Rex Luna Milo Bella Coco Rocky Nala Simba Daisy Ziggy Otto Pepper Hazel Bruno Kiwi Pixie Shadow Ruby"
MAKER = "Nova Terra Alpha Orion Breeze Classic Royal Urban Mini Turbo"
MONTHS = "January February March April May June July August September October November December"
POOLS = {
    "country": "Norway Brazil Japan Kenya Canada Italy Poland Chile",
    "city": "Oslo Lyon Porto Boston Dublin Kyoto Quito Vienna",
    "color": "red blue green black white",
    "language": "Spanish French German Arabic Hindi",
}


class _Dice:
    """Draws made of `random()` alone: its sequence is the one that Python promises to keep across versions."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Any], k: int) -> list[Any]:
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


@dataclass(frozen=True)
class Example:
    """One question: `prompt` (tables and question), `completion` (the SQL on one line, ending in ";"), the name of the
    `schema`, the `ddl` script that makes and fills its tables, and the `kind` of question, one of `KINDS`."""

    prompt: str
    completion: str
    schema: str
    ddl: str
    kind: str


# ---- schemas ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    name: str
    sigil: str  # ":" label-like text, "=" category, "@" date, "#" count, "$" summable number, "~" measured number
    spec: str
    nullable: bool
    word: str  # what English calls it; the participle of a date

    @property
    def quantity(self) -> str:
        return f"number of {self.word}" if self.sigil == "#" else self.word


@dataclass
class _Table:
    name: str
    singular: str
    link: str  # the preposition between child and parent
    columns: list[_Column]  # the label first; id and foreign key apart
    header: list[str]
    rows: list[dict[str, Any]]

    @property
    def label(self) -> _Column:
        return self.columns[0]

    def draw(self, dice: _Dice, sigils: str, nullable: bool | None = False) -> _Column:
        """A column of one of these sigils; raises `_NoFit` when the table has none. `nullable=None` takes either."""
        fits = [c for c in self.columns[1:] if c.sigil in sigils and nullable in (None, c.nullable)]
        if not fits:
            raise _NoFit
        return dice.pick(fits)

    def values(self, column: _Column) -> list[Any]:
        return sorted({r[column.name] for r in self.rows} - {None})


class _NoFit(Exception):
    """This question cannot be asked of this schema; draw again."""


def _parse_column(dice: _Dice, text: str) -> _Column:
    match = re.fullmatch(r"(\w+)([:=@#$~]?)(.*?)(\??)", text)
    assert match, text
    word, sigil, spec, null = match.groups()
    name = dice.pick([f"{word}_on", f"{word}_date", f"date_{word}"]) if sigil == "@" else word
    return _Column(name, sigil or "=", spec or "|".join(POOLS.get(word, "").split()), bool(null), word)


def _day(dice: _Dice) -> str:
    return f"{2015 + dice.below(10)}-{1 + dice.below(12):02d}-{2 + dice.below(27):02d}"


def _text(dice: _Dice, pool: str) -> str:
    first, last = dice.pick(FIRST.split()), dice.pick(LAST.split())
    match pool:
        case "person":
            return f"{first} {last}"
        case "work":
            return f"{dice.pick(ADJECTIVE.split())} {dice.pick(NOUN.split())}"
        case "place":
            return dice.pick(PREFIX.split()) + dice.pick(SUFFIX.split())
        case "firm":
            return dice.pick(FIRM.split())
        case "pet":
            return dice.pick(PET.split())
        case "code":
            return "".join(dice.pick("ABCDEFGHKLMNPRSTVXZ") for _ in range(2)) + str(100 + dice.below(900))
        case "street":
            return f"{1 + dice.below(90)} {dice.pick(PREFIX.split())} Street"
        case "phone":
            return f"555-{1000 + dice.below(9000)}"
        case "email":
            return f"{first.lower()}@mail.com"
        case "site":
            return f"{dice.pick(FIRM.split()).lower()}.org"
        case _:
            return f"{dice.pick(MAKER.split())} {dice.pick(pool.split('|'))}"


def _number(dice: _Dice, span: str) -> float:
    """A number with the decimals that "low-high" is written with; whole numbers keep three digits."""
    low, high = span.split("-")
    scale = 10 ** len(low.partition(".")[2])
    unit = 10 ** max(0, len(high.partition(".")[0]) - 3) if scale == 1 else 1
    first, last = round(float(low) * scale) // unit, round(float(high) * scale) // unit
    ticks = (first + dice.below(last - first + 1)) * unit
    return ticks / scale if scale > 1 else ticks


def _fill(dice: _Dice, column: _Column, n: int) -> list[Any]:
    """n values of a column: repeated in a category, otherwise all different, so that no order has a tie."""
    values: list[Any]
    if column.sigil == "=":
        options = column.spec.split("|")
        values = dice.sample([options[i % min(len(options), 5)] for i in range(n)], n)
        values = [v if dice.below(3) else dice.pick(options) for v in values]
    else:
        different: dict[Any, None] = {}
        while len(different) < n:
            if column.sigil == ":":
                value: Any = _text(dice, column.spec)
            else:
                value = _day(dice) if column.sigil == "@" else _number(dice, column.spec)
            different[value] = None
        values = list(different)
    if column.nullable:
        for i in dice.sample(range(n), 2 + dice.below(3)):
            values[i] = None
    return values


def _table(dice: _Dice, line: str, parent: _Table | None) -> _Table:
    """One table with its label, a draw of its other columns, and 8 to 15 rows."""
    words = line.split()
    start = 2 if parent is None else 3
    columns = [_parse_column(dice, w) for w in words[start:]]
    keep = min(len(columns) - 1, (2 if parent is None else 3) + dice.below(2))
    columns = columns[:1] + dice.sample(columns[1:], keep)
    n = 8 + dice.below(3) if parent is None else 11 + dice.below(5)
    filled = {c.name: _fill(dice, c, n) for c in columns}
    header = ["id", *filled]
    if parent is not None:
        key = f"{parent.singular}_id"
        m = len(parent.rows)
        used = dice.sample(range(1, m + 1), m - dice.pick([0, 0, 1, 2]))
        filled[key] = dice.sample(used + [dice.pick(used) for _ in range(n - len(used))], n)
        header.insert(dice.pick([1, 2, len(header)]), key)
    rows = [{"id": i + 1} | {name: values[i] for name, values in filled.items()} for i in range(n)]
    return _Table(words[0], words[1], words[2] if parent else "", columns, header, rows)


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _ddl(tables: Sequence[_Table]) -> str:
    lines = []
    for t in tables:
        types = {"id": "INTEGER PRIMARY KEY"}
        for c in t.columns:
            number = "REAL" if "." in c.spec else "INTEGER"
            types[c.name] = {":": "TEXT", "=": "TEXT", "@": "DATE"}.get(c.sigil, number)
        columns = ", ".join(f"{name} {types.get(name, 'INTEGER')}" for name in t.header)
        rows = ", ".join("(" + ", ".join(_literal(row[name]) for name in t.header) + ")" for row in t.rows)
        lines += [f"CREATE TABLE {t.name} ({columns});", f"INSERT INTO {t.name} VALUES {rows};"]
    return "\n".join(lines)


# ---- English ---------------------------------------------------------------------------------------------------------


def _plural(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _quoted(dice: _Dice, value: str) -> str:
    return dice.pick([value, value, f'"{value}"'])


def _spoken_date(dice: _Dice, iso: str) -> str:
    year, month, day = iso.split("-")
    return dice.pick([iso, iso, f"{MONTHS.split()[int(month) - 1]} {int(day)}, {year}"])


def _round_between(low: float, high: float) -> float:
    """The roundest number strictly between the two (whole between whole numbers), or `low` where there is none."""
    whole = isinstance(low, int) and isinstance(high, int)
    for step in (1000, 500, 100, 50, 10, 5, 1) if whole else (100, 50, 10, 5, 1, 0.5, 0.1, 0.05):
        value = round((math.floor(low / step + 1e-9) + 1) * step, 2)
        if low < value < high:
            return int(value) if value == int(value) else value
    return low


def _is_value(dice: _Dice, t: _Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "=")
    value = dice.pick(t.values(c))
    v = _quoted(dice, value)
    phrases = [f"whose {c.word} is {v}", f"with {c.word} {v}", f"where the {c.word} is {v}"]
    if c.word in ("country", "city"):
        phrases += [f"{'from' if c.word == 'country' else 'in'} {v}"] * 3
    if dice.below(6) == 0:
        other = dice.pick(t.values(c))
        if other == value:
            raise _NoFit
        two = f"{v} or {_quoted(dice, other)}"
        return f"whose {c.word} is {two}", f"{q}{c.name} IN ({_literal(value)}, {_literal(other)})"
    return dice.pick(phrases), f"{q}{c.name} = {_literal(value)}"


def _compares(dice: _Dice, t: _Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "#$~", None)
    values = t.values(c)
    i = 1 + dice.below(len(values) - 2)
    sign = dice.pick([">", ">", "<", "<", ">=", "<=", "BETWEEN"])
    v: Any = values[i]
    if sign == "BETWEEN":
        j = min(len(values) - 2, i + dice.below(4))
        low, high = _round_between(values[i - 1], v), _round_between(values[j], values[j + 1])
        span = f"between {low} and {high}"
        phrase = f"with {span} {c.word}" if c.sigil == "#" else f"with {_a(c.word)} {span}"
        return phrase, f"{q}{c.name} {span.upper()}"
    if sign == ">":
        v = _round_between(values[i - 1], values[i])
    elif sign == "<":
        v = _round_between(values[i], values[i + 1])
        v = values[i + 1] if v == values[i] else v
    count, measure = {
        ">": (["more than", "over"], ["above", "over", "greater than", "higher than"]),
        "<": (["fewer than", "less than"], ["below", "under", "less than", "lower than"]),
        ">=": (["at least"], ["of at least"]),
        "<=": (["at most"], ["of at most", "of no more than"]),
    }[sign]
    if c.sigil == "#":
        phrase = f"with {dice.pick(count)} {v} {c.word}"
    else:
        how = dice.pick(measure)
        of = how.removeprefix("of ")
        phrase = dice.pick([f"with {_a(c.word)} {how} {v}", f"whose {c.word} is {of} {v}"])
    return phrase, f"{q}{c.name} {sign} {v}"


def _dated(dice: _Dice, t: _Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "@", None)
    values = t.values(c)
    year, month, _ = dice.pick(values[1:-1]).split("-")
    shape = dice.pick(["before", "after", "before", "after", "year", "year", "month"])
    if shape == "year":
        phrase = dice.pick([f"{c.word} in {year}", f"{c.word} during {year}", f"{c.word} in the year {year}"])
        return phrase, f"{q}{c.name} LIKE '{year}-%'"
    if shape == "month":
        return f"{c.word} in {MONTHS.split()[int(month) - 1]} {year}", f"{q}{c.name} LIKE '{year}-{month}-%'"
    day = f"{year}-{month}-01"
    sign = "<" if shape == "before" else ">"
    return f"{c.word} {shape} {_spoken_date(dice, day)}", f"{q}{c.name} {sign} '{day}'"


def _missing(dice: _Dice, t: _Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, ":=@$~", True)
    have = dice.below(4) == 0
    if c.sigil == "@":
        phrases = [f"already {c.word}"] if have else [f"not yet {c.word}", f"not {c.word} yet", f"still not {c.word}"]
    elif have:
        phrases = [f"with a known {c.word}", f"whose {c.word} is known", f"whose {c.word} is not missing"]
    else:
        phrases = [f"with no {c.word}", f"with no known {c.word}", f"without {_a(c.word)}"]
        phrases += [
            f"{whose} {c.word} is {gone}" for whose in ("whose", "where the") for gone in ("missing", "unknown")
        ]
    return dice.pick(phrases), f"{q}{c.name} IS {'NOT ' if have else ''}NULL"


def _is_not(dice: _Dice, t: _Table, q: str = "") -> tuple[str, str]:
    c = t.draw(dice, "=")
    value = dice.pick(t.values(c))
    v = _quoted(dice, value)
    phrases = [
        f"whose {c.word} is not {v}",
        f"with {_a(c.word)} other than {v}",
        f"where the {c.word} is anything but {v}",
    ]
    if c.word in ("country", "city"):
        phrases += [f"not {'from' if c.word == 'country' else 'in'} {v}"] * 3
    return dice.pick(phrases), f"{q}{c.name} <> {_literal(value)}"


def _condition(dice: _Dice, t: _Table, q: str = "") -> tuple[str, str]:
    """What follows the noun, and its WHERE; `q` qualifies the columns ("books.")."""
    first = dice.pick([_is_value, _compares])(dice, t, q)
    if dice.below(6) or " IN " in first[1]:
        return first
    second = dice.pick([_compares, _dated])(dice, t, q)
    if first[1].split()[0] == second[1].split()[0]:
        return first
    return f"{first[0]} and {second[0]}", f"{first[1]} AND {second[1]}"


def _ask_for(dice: _Dice, words: Sequence[str], t: _Table, phrase: str) -> str:
    """A request for these columns of some rows of a table."""
    one, many = " and ".join(words), " and ".join(_plural(w) for w in words)
    return dice.pick(
        [
            f"List the {many} of {t.name} {phrase}.",
            f"Show me the {many} of all {t.name} {phrase}.",
            f"What are the {many} of the {t.name} {phrase}?",
            f"Give the {one} of every {t.singular} {phrase}.",
            f"Find the {many} of {t.name} {phrase}.",
            f"Return the {one} of each {t.singular} {phrase}.",
            f"Can you list the {many} of {t.name} {phrase}?",
            f"I need the {many} of the {t.name} {phrase}.",
            f"Please show the {many} of {t.name} {phrase}.",
            f"Tell me the {one} of every {t.singular} {phrase}.",
        ]
    )


def _ask_count(dice: _Dice, t: _Table, phrase: str) -> str:
    return dice.pick(
        [
            f"How many {t.name} are there {phrase}?",
            f"How many {t.name} {phrase} are there?",
            f"Count the {t.name} {phrase}.",
            f"What is the number of {t.name} {phrase}?",
            f"Give me the number of {t.name} {phrase}.",
            f"Find how many {t.name} there are {phrase}.",
        ]
    )


def _ask_number(dice: _Dice, what: str, rows: str) -> str:
    return dice.pick(
        [
            f"What is the {what} of {rows}?",
            f"Find the {what} of all {rows}.",
            f"Show the {what} of the {rows}.",
            f"Compute the {what} of {rows}.",
            f"I want to know the {what} of {rows}.",
        ]
    )


def _aggregate_of(dice: _Dice, t: _Table, q: str = "") -> tuple[str, str]:
    """An aggregate in English and in SQL; only what adds up is summed."""
    function = dice.pick(["AVG", "AVG", "MAX", "MIN", "SUM"])
    c = t.draw(dice, "#$" if function == "SUM" else "#$~", None)
    adjectives = {
        "AVG": ["average", "mean"],
        "MAX": ["highest", "maximum"],
        "MIN": ["lowest", "minimum"],
        "SUM": ["total", "combined"],
    }
    return f"{dice.pick(adjectives[function])} {c.quantity}", f"{function}({q}{c.name})"


def _superlative(dice: _Dice, t: _Table, noun: str, q: str = "") -> tuple[str, str]:
    """The noun with its superlative ("book with the highest price") and the ORDER BY that goes with it."""
    c = t.draw(dice, "#$~@")
    down = dice.below(3) > 0
    if c.sigil == "@":
        english = f"{'most recently' if down else 'earliest'} {c.word} {noun}"
    elif c.sigil == "#":
        english = f"{noun} with the {'most' if down else 'fewest'} {c.word}"
    else:
        english = f"{noun} with the {'highest' if down else 'lowest'} {c.word}"
    return english, f"{q}{c.name} {'DESC' if down else 'ASC'}"


# ---- the kinds of question -------------------------------------------------------------------------------------------


def _rows(dice: _Dice, t: _Table, phrase: str, where: str) -> Asked:
    columns = [t.label]
    if dice.below(4) == 0 and (other := t.draw(dice, "=$~")).name not in where:
        columns.append(other)
    names = ", ".join(c.name for c in columns)
    return _ask_for(dice, [c.word for c in columns], t, phrase), f"SELECT {names} FROM {t.name} WHERE {where};"


def _rows_or_count(dice: _Dice, t: _Table, phrase: str, where: str) -> Asked:
    if dice.below(3):
        return _rows(dice, t, phrase, where)
    return _ask_count(dice, t, phrase), f"SELECT COUNT(*) FROM {t.name} WHERE {where};"


def _lookup(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    c = t.draw(dice, ":=@#$~", None)
    value = dice.pick(t.values(t.label))
    row = f"the {t.singular} {_quoted(dice, value)}"
    sql = f"SELECT {c.name} FROM {t.name} WHERE {t.label.name} = {_literal(value)};"
    if c.sigil == "@":
        return dice.pick([f"When was {row} {c.word}?", f"On which date was {row} {c.word}?"]), sql
    if c.sigil == "#" and dice.below(2):
        return f"How many {c.word} does {row} have?", sql
    return f"{dice.pick(['What is', 'Show', 'Find', 'Tell me'])} the {c.quantity} of {row}.", sql


def _filter(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    return _rows(dice, t, *_condition(dice, t))


def _count(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    if dice.below(12) == 0:
        return dice.pick([f"How many {t.name} are there?", f"Count all {t.name}."]), f"SELECT COUNT(*) FROM {t.name};"
    phrase, where = _condition(dice, t)
    return _ask_count(dice, t, phrase), f"SELECT COUNT(*) FROM {t.name} WHERE {where};"


def _aggregate(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    what, call = _aggregate_of(dice, t)
    if dice.below(2):
        return _ask_number(dice, what, t.name), f"SELECT {call} FROM {t.name};"
    phrase, where = dice.pick([_is_value, _is_value, _compares, _dated])(dice, t)
    if where.split()[0] in call:
        raise _NoFit
    return _ask_number(dice, what, f"{t.name} {phrase}"), f"SELECT {call} FROM {t.name} WHERE {where};"


def _distinct(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    c = t.draw(dice, "=")
    many = _plural(c.word)
    if dice.below(2):
        ask = [
            f"How many different {many} are there among the {t.name}?",
            f"Count the distinct {many} of {t.name}.",
            f"What is the number of different {many} of {t.name}?",
        ]
        return dice.pick(ask), f"SELECT COUNT(DISTINCT {c.name}) FROM {t.name};"
    ask = [
        f"List the different {many} of {t.name}.",
        f"What are the distinct {many} of the {t.name}?",
        f"Show every {c.word} that occurs among the {t.name}, without repeats.",
        f"Which different {many} do the {t.name} have?",
    ]
    return dice.pick(ask), f"SELECT DISTINCT {c.name} FROM {t.name};"


def _order(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    label, many = t.label.word, _plural(t.label.word)
    head = f"SELECT {t.label.name} FROM {t.name} ORDER BY"
    shape = dice.below(3)
    if shape == 0:
        row, order = _superlative(dice, t, t.singular)
        return (
            f"{dice.pick(['What is', 'Find', 'Give me', 'Show'])} the {label} of the {row}.",
            f"{head} {order} LIMIT 1;",
        )
    if shape == 1:
        n = 2 + dice.below(4)
        noun = f"{dice.pick([n, ('two', 'three', 'four', 'five')[n - 2]])}"
        rows, order = _superlative(dice, t, t.name)
        verb = dice.pick(["What are", "List", "Give me", "Show me"])
        return f"{verb} the {many} of the {noun} {rows}.", f"{head} {order} LIMIT {n};"
    c = t.draw(dice, "#$~@")
    down = dice.below(2)
    if c.sigil == "@":
        how = f"by the date they were {c.word}, {'newest' if down else 'oldest'} first"
    else:
        ways = ["highest first", "from highest to lowest", "in descending order"]
        ways = ways if down else ["lowest first", "from lowest to highest", "in ascending order"]
        how = f"by {c.quantity}, {dice.pick(ways)}"
    ask = [
        f"List the {many} of all {t.name} sorted {how}.",
        f"Show the {many} of the {t.name}, ordered {how}.",
        f"Sort the {t.name} {how}, and give their {many}.",
    ]
    return dice.pick(ask), f"{head} {c.name} {'DESC' if down else 'ASC'};"


def _group(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    c = t.draw(dice, "=")
    by = f"FROM {t.name} GROUP BY {c.name}"
    shape = dice.below(4)
    if shape == 0:
        ask = [
            f"How many {t.name} are there for each {c.word}?",
            f"For each {c.word}, show the number of {t.name}.",
            f"Show every {c.word} with its number of {t.name}.",
            f"Count the {t.name} per {c.word}, giving the {c.word} and the count.",
        ]
        return dice.pick(ask), f"SELECT {c.name}, COUNT(*) {by};"
    if shape == 1:
        what, call = _aggregate_of(dice, t)
        ask = [
            f"What is the {what} of {t.name} for each {c.word}?",
            f"For each {c.word}, show the {what} of its {t.name}.",
            f"Show every {c.word} with the {what} of its {t.name}.",
            f"Give the {c.word} and the {what} of {t.name} per {c.word}.",
        ]
        return dice.pick(ask), f"SELECT {c.name}, {call} {by};"
    if shape == 2:
        n = 1 + dice.below(4)
        than = f"more than {n} {t.name}" if n > 1 else f"more than one {t.singular}"
        ask = [f"Which {_plural(c.word)} have {than}?", f"List each {c.word} with {than}."]
        return dice.pick(ask), f"SELECT {c.name} {by} HAVING COUNT(*) > {n};"
    most, order = dice.pick([("most", "DESC"), ("most", "DESC"), ("fewest", "ASC")])
    ask = [f"Which {c.word} has the {most} {t.name}?", f"Find the {c.word} with the {most} {t.name}."]
    return dice.pick(ask), f"SELECT {c.name} {by} ORDER BY COUNT(*) {order} LIMIT 1;"


def _date(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    if dice.below(6):
        return _rows_or_count(dice, t, *_dated(dice, t))
    c = t.draw(dice, "@", None)
    word, function = dice.pick([("first", "MIN"), ("last", "MAX")])
    ask = f"{dice.pick(['When', 'On which date'])} was the {word} {t.singular} {c.word}?"
    return ask, f"SELECT {function}({c.name}) FROM {t.name};"


def _null(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    t = dice.pick([parent, child])
    return _rows_or_count(dice, t, *_missing(dice, t))


def _negation(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    if dice.below(3):
        t = dice.pick([parent, child])
        return _rows_or_count(dice, t, *_is_not(dice, t))
    phrase = dice.pick([f"without any {child.name}", f"with no {child.name}", f"without a single {child.singular}"])
    return _rows_or_count(dice, parent, phrase, f"id NOT IN (SELECT {parent.singular}_id FROM {child.name})")


def _joined(parent: _Table, child: _Table) -> str:
    return f"FROM {child.name} JOIN {parent.name} ON {child.name}.{parent.singular}_id = {parent.name}.id"


def _join(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    source = _joined(parent, child)
    label, parent_label = f"{child.name}.{child.label.name}", f"{parent.name}.{parent.label.name}"
    its_parent = f"the {parent.label.word} of the {parent.singular}"
    shape = dice.below(8)
    if shape == 0:
        ask = [
            f"Show the {child.label.word} of each {child.singular} and {its_parent} it belongs to.",
            f"For every {child.singular}, give its {child.label.word} and {its_parent}.",
        ]
        return dice.pick(ask), f"SELECT {label}, {parent_label} {source};"
    if shape == 1:
        value = dice.pick(child.values(child.label))
        row = f"{child.singular} {_quoted(dice, value)}"
        return (
            f"{dice.pick(['What is', 'Find'])} {its_parent} of the {row}.",
            f"SELECT {parent_label} {source} WHERE {label} = {_literal(value)};",
        )
    if shape == 2:
        row, order = _superlative(dice, child, child.singular, f"{child.name}.")
        question = f"{dice.pick(['What is', 'Find'])} {its_parent} of the {row}."
        return question, f"SELECT {parent_label} {source} ORDER BY {order} LIMIT 1;"
    if shape in (3, 4):
        value = dice.pick(parent.values(parent.label))
        phrase = f"{child.link} the {parent.singular} {_quoted(dice, value)}"
        where = f"{parent_label} = {_literal(value)}"
    else:
        phrase, where = dice.pick([_is_value, _is_value, _compares, _dated])(dice, parent, f"{parent.name}.")
        phrase = f"{child.link} {parent.name} {phrase}"
    if shape in (3, 5, 6):
        return _ask_for(dice, [child.label.word], child, phrase), f"SELECT {label} {source} WHERE {where};"
    if dice.below(2):
        return _ask_count(dice, child, phrase), f"SELECT COUNT(*) {source} WHERE {where};"
    what, call = _aggregate_of(dice, child, f"{child.name}.")
    return _ask_number(dice, what, f"{child.name} {phrase}"), f"SELECT {call} {source} WHERE {where};"


def _join_group(dice: _Dice, parent: _Table, child: _Table) -> Asked:
    if len({r[f"{parent.singular}_id"] for r in child.rows}) < len(parent.rows):
        raise _NoFit  # whether a parent without children is a group of zero would be open
    source = _joined(parent, child)
    c = parent.label
    shape = dice.below(4)
    if shape == 0:
        most, order = dice.pick([("most", "DESC"), ("most", "DESC"), ("fewest", "ASC")])
        key, group = f"{parent.name}.{c.name}", f"{parent.singular} with the {most} {child.name}"
        question = f"{dice.pick(['What is', 'Find'])} the {c.word} of the {group}."
        return question, f"SELECT {key} {source} GROUP BY {key} ORDER BY COUNT(*) {order} LIMIT 1;"
    if shape == 1:
        c = parent.draw(dice, "=")
    key, group = f"{parent.name}.{c.name}", f"{parent.singular} {c.word}"
    what, call = (f"number of {child.name}", "COUNT(*)")
    if dice.below(2):
        what, call = _aggregate_of(dice, child, f"{child.name}.")
        what += f" of the {child.name}"
    ask = [
        f"For each {group}, show the {what}.",
        f"What is the {what} for each {group}?",
        f"Show every {group} together with the {what}.",
    ]
    return dice.pick(ask), f"SELECT {key}, {call} {source} GROUP BY {key};"


# Kind of question -> (its share in percent, what asks it). The first five are the easy half.
KINDS: dict[str, tuple[int, Callable[[_Dice, _Table, _Table], Asked]]] = {
    "lookup": (8, _lookup),
    "filter": (16, _filter),
    "count": (12, _count),
    "aggregate": (11, _aggregate),
    "distinct": (5, _distinct),
    "order": (11, _order),
    "group": (9, _group),
    "date": (7, _date),
    "null": (5, _null),
    "negation": (5, _negation),
    "join": (8, _join),
    "join_group": (3, _join_group),
}


# ---- examples --------------------------------------------------------------------------------------------------------

_FLIPS = [(" WHERE .*?(?= GROUP| ORDER|;)", ""), (" HAVING .*;", ";"), (r" LIMIT \d+", ""), ("DISTINCT ", "")]
_FLIPS += [("AVG", "SUM"), ("SUM", "AVG"), ("MIN", "MAX"), ("MAX", "MIN"), ("DESC", "ASC"), ("ASC", "DESC")]
_FLIPS += [(" > ", " < "), (" < ", " > "), (" >= ", " < "), (" <= ", " > "), (" <> ", " = "), (" NOT ", " ")]
_FLIPS += [("IS NULL", "IS NOT NULL"), ("LIKE", "NOT LIKE"), (" IN ", " NOT IN "), ("BETWEEN", "NOT BETWEEN")]


def _telling(sql: str, ddl: str) -> bool:
    """Whether the answer on these rows tells the query from its near misses (see the head of this file)."""
    with contextlib.closing(_database(ddl)) as database:
        answer = _run(database, sql, math.inf)
        if not answer or any(value is None for row in answer for value in row):
            return False
        if sql.startswith("SELECT COUNT(*)") and answer[0][0] < 2:
            return False
        for pattern, turned in _FLIPS:
            miss = re.sub(pattern, turned, sql, count=1)
            if miss != sql and _same(_run(database, miss, math.inf), answer, "ORDER BY" in sql):
                return False
        ties = [re.sub(r"( ORDER BY .*?)( LIMIT|;)", rf"\1, 1 {way}\2", sql) for way in ("ASC", "DESC")]
        return all(_same(_run(database, tie, math.inf), answer, True) for tie in ties if tie != sql)


def _example(dice: _Dice, domain: str, kind: str) -> Example | None:
    name, *lines = domain.splitlines()
    parent = _table(dice, lines[0], None)
    child = _table(dice, lines[1], parent)
    try:
        question, sql = KINDS[kind][1](dice, parent, child)
    except _NoFit:
        return None
    ddl = _ddl([parent, child])
    if not _telling(sql, ddl):
        return None
    if question.startswith("What"):  # also where "What is" was drawn as one of several openings
        question = question[:-1] + "?"
    if dice.below(8) == 0:
        question = question[0].lower() + question[1:-1]
    tables = ", ".join(f"{t.name}({', '.join(t.header)})" for t in (parent, child))
    return Example(f"Write one SQLite query.\nTables: {tables}\nQuestion: {question}\nSQL:", sql, name, ddl, kind)


def generate(n: int, seed: int, split: Split) -> list[Example]:
    """n examples with n different prompts, the same for the same arguments on every machine; a smaller n with the same
    seed gives the beginning of the same list. Raises `CTError` unless 1 <= n <= `MAX_EXAMPLES` and the split exists."""
    if split not in DOMAINS:
        raise CTError(f"split is {split!r}; it must be one of {', '.join(DOMAINS)}.")
    if not 1 <= n <= MAX_EXAMPLES:
        raise CTError(f"n is {n}; ask for 1 to {MAX_EXAMPLES} examples.")
    domains = DOMAINS[split].strip().split("\n\n")
    wheel = [kind for kind, (share, _) in KINDS.items() for _ in range(share)]
    dice = _Dice(f"sql {split} {seed}")
    examples: dict[str, Example] = {}
    while len(examples) < n:
        kind = dice.pick(wheel)
        while (example := _example(dice, dice.pick(domains), kind)) is None:
            pass
        examples.setdefault(example.prompt, example)
    return list(examples.values())


# ---- scoring ---------------------------------------------------------------------------------------------------------

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}


def _database(ddl: str) -> sqlite3.Connection:
    """The filled database, in memory and from now on read-only."""
    database = sqlite3.connect(":memory:")
    database.executescript(ddl)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
    return database


def _run(database: sqlite3.Connection, sql: str, time_limit: float) -> list[Row] | None:
    """The rows of one SELECT, or None where it fails, runs out of time, or returns more than `MAX_ROWS` rows."""
    stop = time.monotonic() + time_limit
    database.set_progress_handler(lambda: time.monotonic() > stop, 1000)
    try:
        rows = database.execute(sql).fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
        return None
    return rows if len(rows) <= MAX_ROWS else None


def _equal(a: Row, b: Row) -> bool:
    def one(x: Any, y: Any) -> bool:
        if isinstance(x, int | float) and isinstance(y, int | float):
            return math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9)
        return type(x) is type(y) and x == y

    return len(a) == len(b) and all(map(one, a, b))


def _same(a: list[Row] | None, b: list[Row], ordered: bool) -> bool:
    if a is None or len(a) != len(b):
        return False
    if ordered:
        return all(map(_equal, a, b))
    left = list(b)
    for row in a:
        match = next((i for i, other in enumerate(left) if _equal(row, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def execution_match(sql: str, example: Example, time_limit: float = TIME_LIMIT) -> bool:
    """Whether `sql` returns what the example's own SQL returns on the example's rows.

    The order of rows counts only where the example's SQL has ORDER BY, the order of columns always; numbers are equal
    within 1e-6 of their size; column names are ignored. Only a single reading statement is run, for `time_limit`
    seconds at most; anything else is no match.
    Raises `CTError` where the example's own SQL (not limited in time) fails or returns more than `MAX_ROWS` rows."""
    with contextlib.closing(_database(example.ddl)) as database:
        gold = _run(database, example.completion, math.inf)
        if gold is None:
            raise CTError(
                f"the example's own SQL fails or returns over {MAX_ROWS} rows; correct it: {example.completion}"
            )
        return _same(_run(database, sql, time_limit), gold, "ORDER BY" in example.completion)


_FENCE = re.compile(r"```\w*\n(.*?)(?:```|\Z)", re.DOTALL)
_START = re.compile(r"^\s*(?:SELECT\b|WITH\s+\w+\s+AS\b)", re.IGNORECASE | re.MULTILINE)
_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|--[^\n]*|(?P<end>;|\n[ \t]*\n)|.""", re.DOTALL)


def extract_sql(text: str) -> str:
    """The first SQL statement of a generated text: inside a code fence if there is one, from the first line that starts
    a query, to the first ";" outside quotes (kept) or the first blank line."""
    if fence := _FENCE.search(text):
        text = fence[1]
    if start := _START.search(text):
        text = text[start.start() :]
    text = text.strip()
    for token in _TOKEN.finditer(text):
        if token["end"]:
            return text[: token.start()] + token["end"].strip()
    return text


def execution_accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> float:
    """The fraction, 0 to 1, of generated texts whose first SQL statement matches its example (`execution_match`).
    Raises `CTError` when the two lists differ in length or are empty."""
    if len(predictions) != len(examples) or not examples:
        raise CTError(
            f"{len(predictions)} predictions for {len(examples)} examples; give one for each, and at least one."
        )
    hits = sum(execution_match(extract_sql(text), example) for text, example in zip(predictions, examples, strict=True))
    return hits / len(examples)
