"""Builds tables.json: `python -m visor_jax.data.almanac.build_tables PACKAGES [FILE]`.

In: PACKAGES, a folder with these unpacked packages, each in a folder of its own name (the archives of `pip download
--no-deps NAME` and `npm pack NAME` are unpacked as they are):

    bokeh_sampledata   PyPI bokeh-sampledata 2026.1   the license of each set is recorded in licenses/datasets.json
    package            npm vega-datasets 3.2.1        the licenses of each set are recorded in datapackage.json
    countryinfo        PyPI countryinfo 1.0.1         MIT
    mendeleev          PyPI mendeleev 1.3.0           MIT

Out: FILE (default: the one in the package): the tables, each with its source, license and split. A table is left out
with an error if its recorded license is not in `LICENSES`. Labels have at most 8 characters; values are whole numbers
from 1 to 999, scaled and rounded, in the unit that the column names.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_BOKEH = "https://github.com/bokeh/bokeh_sampledata"
_VEGA = "https://github.com/vega/vega-datasets"
_COUNTRYINFO = "https://github.com/porimol/countryinfo"
_MENDELEEV = "https://github.com/lmmentel/mendeleev"

MAX_LABEL = 8  # characters
LICENSES = (
    "Public domain", "Public Domain", "CC0-1.0", "CC0 1.0 Universal", "CC-BY-2.0", "CC-BY-3.0-IGO", "MIT",
    "BSD-3-Clause", "BSD-3-Clause (Bokeh contribution)", "Creative Commons Attribution 4.0 International",
    "U.S. Government Dataset", "U.S. Public Domain",
)  # fmt: skip


def _words(text: str) -> list[str]:
    return text.split()


COUNTRIES = _words(
    """
    Austria Belgium Bolivia Brazil Canada Chile China Croatia Cuba Egypt Finland France Georgia Germany Greece
    Haiti Iceland India Iran Iraq Ireland Israel Italy Jamaica Japan Kenya Lebanon Mexico Nigeria Norway
    Pakistan Peru Poland Portugal Rwanda Spain Sweden Turkey
    """
)
STATES = _words(
    """
    Alabama Alaska Arizona Colorado Florida Hawaii Idaho Illinois Indiana Iowa Kansas Kentucky Maine Maryland
    Michigan Montana Nebraska Nevada Ohio Oklahoma Oregon Texas Utah Vermont Virginia Wyoming
    """
)
ELEMENTS = _words(
    """
    Argon Calcium Carbon Chromium Cobalt Copper Gold Helium Iodine Iron Krypton Lead Lithium Mercury Neon Nickel
    Nitrogen Oxygen Platinum Radium Silicon Silver Sodium Sulfur Tin Titanium Uranium Zinc
    """
)
MONTHS = _words(
    """
    Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec
    """
)
ANIMALS = _words(
    """
    Bat Coyote Crow Deer Dove Egret Goose Gull Hawk Heron Kestrel Lark Owl Pigeon Robin Sparrow Swallow
    """
)
CAPITALS = _words(
    """
    Athens Berlin Cairo Dublin Havana Lima London Madrid Moscow Nairobi Oslo Ottawa Paris Rome Tehran Tokyo
    Vienna Warsaw
    """
)


class Packages:
    """Reads files of the unpacked packages, and the license that each package records for them."""

    def __init__(self, folder: Path) -> None:
        self._bokeh = folder / "bokeh_sampledata" / "bokeh_sampledata" / "_data"
        self._vega = folder / "package"
        self.countryinfo = folder / "countryinfo" / "countryinfo" / "data"
        self.mendeleev = folder / "mendeleev" / "mendeleev" / "elements.db"
        records = next(folder.glob("bokeh_sampledata/*.dist-info/licenses/licenses/datasets.json"))
        listed = json.loads(records.read_text(encoding="utf-8"))
        listed = listed["datasets"] if isinstance(listed, dict) else listed
        self._records = {record["module"]: record for record in listed}
        package = json.loads((self._vega / "datapackage.json").read_text(encoding="utf-8"))
        self._resources = {resource["path"]: resource for resource in package["resources"]}

    def bokeh(self, name: str) -> Any:
        """Returns the rows of a CSV file of bokeh-sampledata, or the value of a JSON file."""
        return _parse(self._bokeh / name)

    def vega(self, name: str) -> Any:
        """Returns the rows of a CSV file of vega-datasets, or the value of a JSON file."""
        return _parse(self._vega / "data" / name)

    def bokeh_source(self, module: str) -> dict[str, str]:
        """Returns package, name, license and attribution of a set of bokeh-sampledata."""
        record = self._records[module]
        url = (record["sources"] or [_BOKEH])[0]
        return _source("bokeh-sampledata 2026.1", module, [record["recorded_license"]], record["attribution"], url)

    def vega_source(self, file: str) -> dict[str, str]:
        """Returns package, name, license and attribution of a set of vega-datasets."""
        resource = self._resources[file]
        titles = [license.get("title") or license.get("name") for license in resource["licenses"]]
        attribution = "; ".join(dict.fromkeys(source["title"] for source in resource["sources"]))
        url = next((source["path"] for source in resource["sources"] if source.get("path")), _VEGA)
        return _source("vega-datasets 3.2.1", file, titles, attribution, url)


def _source(package: str, name: str, licenses: Sequence[str], attribution: str, url: str) -> dict[str, str]:
    for license in licenses:
        if license not in LICENSES:
            raise SystemExit(f"{package} {name}: its recorded license {license!r} is not one of {LICENSES}")
    return {"package": package, "set": name, "license": ", ".join(licenses), "attribution": attribution, "url": url}


def _parse(file: Path) -> Any:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = content.decode("utf-8")
    return json.loads(text) if ".json" in file.suffixes else list(csv.DictReader(io.StringIO(text, newline="")))


def table(
    name: str, split: str, title: str, source: Mapping[str, str], labels: Iterable[str], columns: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns one table.

    `columns` maps each head to (label -> value, factor, unit): the printed value is the value times the factor,
    rounded. A label without a value from 1 to 999 in every column is left out.
    """
    printed = {
        head: {label: round(float(values[label]) * factor) for label in values if values[label] not in ("", None)}
        for head, (values, factor, _) in columns.items()
    }
    kept = [label for label in labels if all(1 <= rows.get(label, 0) <= 999 for rows in printed.values())]
    if len(kept) < 4:
        raise SystemExit(f"{name}: only {len(kept)} labels have values from 1 to 999 in every column")
    for word in (*kept, *columns, title):
        if len(word) > MAX_LABEL:
            raise SystemExit(f"{name}: {word!r} has more than {MAX_LABEL} characters")
    return {
        "name": name, "split": split, "title": title, "source": dict(source), "labels": kept,
        "columns": [
            {"head": head, "unit": columns[head][2], "values": [rows[label] for label in kept]}
            for head, rows in printed.items()
        ],
    }  # fmt: skip


def mean_by(rows: Iterable[Mapping[str, Any]], key: Callable[[Any], str], value: str) -> dict[str, float]:
    """Returns the mean of field `value` of the rows of each key."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[value] not in ("", None, "NaN"):
            groups[key(row)].append(float(row[value]))
    return {label: statistics.fmean(numbers) for label, numbers in groups.items()}


def month_of(row: Mapping[str, Any], field: str = "date") -> str:
    """Returns the short name of the month of a date YYYY-MM-DD."""
    return MONTHS[int(row[field][5:7]) - 1]


# --- countries --------------------------------------------------------------------------------------------------------


def countries(packages: Packages) -> list[dict[str, Any]]:
    """Returns tables about countries: gapminder by year, health and income, emissions, medals, area."""
    tables = []
    rows, source = packages.vega("gapminder.json"), packages.vega_source("gapminder.json")
    for year in (1960, 1975, 1990, 2005):
        of_year = {row["country"]: row for row in rows if row["year"] == year}
        columns = {
            "Life": ({c: row["life_expect"] for c, row in of_year.items()}, 1, "years"),
            "Births": ({c: row["fertility"] for c, row in of_year.items()}, 10, ""),
            "People": ({c: row["pop"] for c, row in of_year.items()}, 1e-6, "millions"),
        }
        split = {1975: "validation"}.get(year, "train")
        tables.append(table(f"gapminder {year}", split, "World", source, COUNTRIES, columns))
    wealth = {row["country"]: row for row in packages.vega("gapminder-health-income.csv")}
    columns = {
        "Income": ({c: row["income"] for c, row in wealth.items()}, 1e-3, ""),
        "Health": ({c: row["health"] for c, row in wealth.items()}, 1, "years"),
        "People": ({c: row["population"] for c, row in wealth.items()}, 1e-6, "millions"),
    }
    source = packages.vega_source("gapminder-health-income.csv")
    tables.append(table("health and income", "test", "Nations", source, COUNTRIES, columns))
    rows = packages.bokeh("emissions.csv.gz")
    by_year = {year: {r["country"]: r["emissions"] for r in rows if float(r["year"]) == year} for year in (1980, 2010)}
    columns = {"Smoke": (by_year[2010], 10, "")}
    tables.append(table("emissions 2010", "train", "Air", packages.bokeh_source("emissions"), COUNTRIES, columns))
    columns = {"Smoke": (by_year[1980], 10, "")}
    tables.append(table("emissions 1980", "train", "Air", packages.bokeh_source("emissions"), COUNTRIES, columns))
    medals = {row["name"]: row["medals"] for row in packages.bokeh("olympics2014.json")["data"]}
    columns = {head: ({c: m[head.lower()] for c, m in medals.items()}, 1, "") for head in ("Gold", "Silver", "Total")}
    source = packages.bokeh_source("olympics2014")
    tables.append(table("olympics", "test", "Medals", source, COUNTRIES, columns))
    return tables + geography(packages)


def geography(packages: Packages) -> list[dict[str, Any]]:
    """Returns tables of countryinfo: area and people of countries, and of the countries of capitals."""
    source = _source("countryinfo 1.0.1", "data", ["MIT"], "Copyright (c) 2018 Porimol Chandro", _COUNTRYINFO)
    known = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(packages.countryinfo.glob("*.json"))]
    by_name = {country["name"]: country for country in known}
    by_capital = {country.get("capital"): country for country in known if country.get("capital") in CAPITALS}

    def columns(chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "Area": ({c: row.get("area") for c, row in chosen.items()}, 1e-4, ""),
            "Borders": ({c: len(row.get("borders") or ()) for c, row in chosen.items()}, 1, ""),
        }

    north = {c: (row.get("capital_latlng") or [0])[0] for c, row in by_capital.items()}
    return [
        table("area", "train", "Land", source, COUNTRIES, columns(by_name)),
        table("latitude", "train", "Cities", source, CAPITALS, {"North": (north, 1, "degrees")}),
    ]


# --- states, months, weather ------------------------------------------------------------------------------------------


def states(packages: Packages) -> list[dict[str, Any]]:
    """Returns tables about states of the United States: strikes of birds, location of the capital, obesity."""
    rows = packages.vega("us-state-capitals.json")
    columns = {
        "North": ({row["state"]: row["lat"] for row in rows}, 1, "degrees"),
        "West": ({row["state"]: -row["lon"] for row in rows}, 1, "degrees"),
    }
    tables = [table("capitals", "train", "States", packages.vega_source("us-state-capitals.json"), STATES, columns)]
    strikes, source = packages.vega("birdstrikes.csv"), packages.vega_source("birdstrikes.csv")

    def count(label: Callable[[Any], str], field: str, value: str) -> Counter:
        return Counter(label(row) for row in strikes if row[field] == value)

    def state(row: Mapping[str, str]) -> str:
        return row["Origin State"]

    def animal(row: Mapping[str, str]) -> str:
        return row["Wildlife Species"].split()[-1].rstrip("s").capitalize()

    columns = {head: (count(state, "Time of day", head), 0.5, "") for head in ("Day", "Night")}
    tables.append(table("strikes by state", "train", "Birds", source, STATES, columns))
    columns = {head: (count(animal, "Time of day", head), 1, "") for head in ("Day", "Night", "Dusk")}
    tables.append(table("strikes by animal", "train", "Birds", source, ANIMALS, columns))
    columns = {head: (count(animal, "Phase of flight", head), 1, "") for head in ("Climb", "Approach")}
    tables.append(table("flight and animal", "test", "Flights", source, ANIMALS, columns))
    return tables


def months(packages: Packages) -> list[dict[str, Any]]:
    """Returns tables by month: the weather of Seattle, New York and Lincoln, unemployment."""
    tables = []
    rows, source = packages.vega("weather.csv"), packages.vega_source("weather.csv")
    for city, split in (("Seattle", "train"), ("New York", "validation")):
        here = [row for row in rows if row["location"] == city]
        sky = {
            head: Counter(month_of(r) for r in here if r["weather"] == head.lower()) for head in ("Sun", "Rain", "Fog")
        }
        columns = {head: (days, 1, "days") for head, days in sky.items()}
        if city == "Seattle":
            tables.append(table("sky of Seattle", split, "Weather", source, MONTHS, columns))
        columns = {
            "High": (mean_by(here, month_of, "temp_max"), 1, "degrees"),
            "Wind": (mean_by(here, month_of, "wind"), 10, ""),
            "Rain": (mean_by(here, month_of, "precipitation"), 10, ""),
        }
        tables.append(table(f"weather of {city}", split, "Weather", source, MONTHS, columns))
    rows = packages.bokeh("lincoln_weather.csv")
    columns = {
        "High": (mean_by(rows, lambda row: month_of(row, "DATE"), "TMAX"), 1, "degrees"),
        "Low": (mean_by(rows, lambda row: month_of(row, "DATE"), "TMIN"), 1, "degrees"),
    }
    tables.append(table("Lincoln", "test", "Weather", packages.bokeh_source("lincoln"), MONTHS, columns))
    rows, source = packages.bokeh("unemployment1948.csv"), packages.bokeh_source("unemployment1948")
    for year, split in (
        ("1955", "train"),
        ("1975", "train"),
        ("1985", "validation"),
        ("1995", "train"),
        ("2005", "test"),
    ):
        row = next(row for row in rows if row["Year"] == year)
        columns = {"Idle": ({month: row[month] for month in MONTHS}, 10, "")}
        tables.append(table(f"unemployment {year}", split, "Jobs", source, MONTHS, columns))
    return tables


# --- elements, makers, shops, studies, work ---------------------------------------------------------------------------


def elements(packages: Packages) -> list[dict[str, Any]]:
    """Returns tables about chemical elements, of two packages."""
    rows = packages.bokeh("elements.csv")
    named = {row["name"].strip(): row for row in rows}
    columns = {
        "Number": ({c: row["atomic number"] for c, row in named.items()}, 1, ""),
        "Mass": ({c: _number(row["atomic mass"]) for c, row in named.items()}, 1, ""),
    }
    source = packages.bokeh_source("periodic_table")
    tables = [table("periodic table", "train", "Elements", source, ELEMENTS, columns)]
    columns = {
        "Melting": ({c: row["melting point"] for c, row in named.items()}, 0.1, ""),
        "Boiling": ({c: row["boiling point"] for c, row in named.items()}, 0.1, ""),
    }
    tables.append(table("melting points", "test", "Heat", source, ELEMENTS, columns))
    with sqlite3.connect(packages.mendeleev) as database:
        found = database.execute("SELECT name, atomic_radius, density, covalent_radius_pyykko FROM elements").fetchall()
    source = _source("mendeleev 1.3.0", "elements", ["MIT"], "Copyright (c) 2015 Lukasz Mentel", _MENDELEEV)
    columns = {
        "Radius": ({name: radius for name, radius, _, _ in found}, 1, "pm"),
        "Density": ({name: density for name, _, density, _ in found}, 5, ""),
    }
    tables.append(table("atoms", "train", "Elements", source, ELEMENTS, columns))
    columns = {"Size": ({name: size for name, _, _, size in found}, 1, "pm")}
    tables.append(table("sizes", "validation", "Elements", source, ELEMENTS, columns))
    return tables


def trade(packages: Packages) -> list[dict[str, Any]]:
    """Returns tables about cars, goods of a shop, studies and work."""
    rows = packages.bokeh("auto-mpg2.csv")
    makers = ["Audi", "Dodge", "Ford", "Honda", "Hyundai", "Jeep", "Nissan", "Pontiac", "Subaru", "Toyota"]

    def maker(row: Mapping[str, str]) -> str:
        return row["manufacturer"].capitalize()

    columns = {"City": (mean_by(rows, maker, "cty"), 1, "mpg"), "Highway": (mean_by(rows, maker, "hwy"), 1, "mpg")}
    tables = [table("mileage", "train", "Cars", packages.bokeh_source("autompg2"), makers, columns)]

    rows, source = packages.bokeh("SampleSuperstore.csv.gz"), packages.bokeh_source("sample_superstore")
    goods = _words("Art Binders Chairs Copiers Labels Machines Paper Phones Storage Supplies Tables")
    columns = {
        region: (Counter(row["Sub-Category"] for row in rows if row["Region"] == region), 0.5, "")
        for region in ("West", "East", "South")
    }
    tables.append(table("orders", "train", "Shop", source, goods, columns))
    columns = {"Price": (mean_by(rows, lambda row: row["Sub-Category"], "Sales"), 0.1, "")}
    tables.append(table("prices", "validation", "Shop", source, goods, columns))

    rows, source = packages.bokeh("percent-bachelors-degrees-women-usa.csv"), packages.bokeh_source("degrees")
    subjects = ["Biology", "Business", "English", "Health", "Art"]
    names = {"Health": "Health Professions", "Art": "Art and Performance"}
    for year, split in (("1975", "train"), ("1990", "train"), ("2005", "test")):
        row = next(row for row in rows if row["Year"] == year)
        columns = {"Women": ({subject: row[names.get(subject, subject)] for subject in subjects}, 1, "percent")}
        tables.append(table(f"degrees {year}", split, "Studies", source, subjects, columns))

    rows = packages.vega("unemployment-across-industries.json")
    industries = {"Finance": "Finance", "Mining": "Mining and Extraction", "Leisure": "Leisure and hospitality"}
    industries |= {"Business": "Business services", "Trade": "Wholesale and Retail Trade", "Other": "Other"}
    source = packages.vega_source("unemployment-across-industries.json")
    for year, split in ((2001, "train"), (2005, "validation"), (2008, "train")):
        rates = mean_by((row for row in rows if row["year"] == year), lambda row: row["series"], "rate")
        columns = {"Idle": ({word: rates[series] for word, series in industries.items()}, 10, "")}
        tables.append(table(f"industries {year}", split, "Work", source, list(industries), columns))
    return tables


def _number(text: str) -> float:
    return float(text.strip("[]").split("(")[0])


def build(folder: Path) -> list[dict[str, Any]]:
    """Returns all tables."""
    packages = Packages(folder)
    return [each for make in (countries, states, months, elements, trade) for each in make(packages)]


def write(folder: Path, file: Path) -> list[dict[str, Any]]:
    """Builds the tables, writes them to `file` as JSON, and returns them."""
    tables = build(folder)
    lines = ",\n".join(json.dumps(each, ensure_ascii=True) for each in tables)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return tables


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("tables.json")
    for each in write(Path(sys.argv[1]), target):
        columns = ", ".join(column["head"] for column in each["columns"])
        print(f"{each['split']:10} {each['name']:20} {len(each['labels']):3} labels: {columns}")
    print(f"{target}: {target.stat().st_size:,} bytes")
