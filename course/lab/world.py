"""The small world: forty people, the places they live in, and four kinds of text about them, with every probability known.

The **general** domain is what the tiny model is pre-trained on: facts about people and places, said and asked for; agreement of verbs with
their subjects across a distracting noun; sums and differences; and technical words, explained, listed and repeated. **clinic**, **legal**
and **sql** are downstream domains: their words are known from the general domain, their sentences and rules are new. Each domain is a
:class:`course.lab.grammar.Source`, so the entropy of its texts, the loss that no model can beat, is exact.
"""

import functools
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from course.lab.grammar import Source, State, Transitions, emit, mixture, uniform, weighted

DOMAINS = ("general", "clinic", "legal", "sql")

NAMES = (
    "ada ben cora dan elif finn gita hugo ines jonas kira leo mira nils olga pavel quinn rosa samir tara "
    "umar vera wim xenia yusuf zoe amir bella carl dora emil fatma goran hana ivan julia kemal lena marco nora"
).split()
CITIES = {
    "oslo": "norway", "bergen": "norway", "paris": "france", "lyon": "france", "rome": "italy", "milan": "italy",
    "madrid": "spain", "seville": "spain", "berlin": "germany", "munich": "germany", "cairo": "egypt", "giza": "egypt",
    "tokyo": "japan", "osaka": "japan", "lima": "peru", "cusco": "peru", "delhi": "india", "mumbai": "india",
}  # fmt: skip
JOBS = "baker pilot nurse painter farmer teacher lawyer tailor barber miner sailor judge".split()
PETS = "cat parrot rabbit goat turtle pony hamster canary snake donkey".split()

ANIMATE = {"dog": "dogs", "boy": "boys", "girl": "girls", "horse": "horses", "king": "kings", "guard": "guards"}
MACHINES = {"car": "cars", "train": "trains", "engine": "engines", "clock": "clocks", "tractor": "tractors", "robot": "robots"}
ANIMATE_VERBS = {"sleeps": "sleep", "eats": "eat", "laughs": "laugh", "waits": "wait", "sings": "sing"}
MACHINE_VERBS = {"stops": "stop", "breaks": "break", "starts": "start", "rattles": "rattle", "rusts": "rust"}
ADJECTIVES = "old small red quiet".split()
PREPOSITIONS = "near behind beside".split()
ADVERBS = "often today again outside".split()

DISEASES = {  # disease -> symptoms, drug, dose, how often
    "flu": ("fever chills aches", "zanavir", "75", "twice"), "migraine": ("headache nausea aura", "triptol", "50", "once"),
    "asthma": ("wheeze cough tightness", "salbuten", "20", "thrice"), "anemia": ("fatigue pallor dizziness", "ferrodan", "80", "once"),
    "gout": ("toepain swelling redness", "uricol", "30", "twice"), "eczema": ("itching rash dryness", "dermacort", "10", "twice"),
    "ulcer": ("heartburn bloating belching", "gastrol", "40", "once"),
    "angina": ("chestpain breathless sweating", "nitrosan", "60", "thrice"),
}  # fmt: skip
PARTIES = {  # party -> counterpart, and the verbs it may be bound to with their objects
    "tenant": ("landlord", {"pay": "rent deposit", "vacate": "premises flat", "sublet": "flat premises"}),
    "landlord": ("tenant", {"repair": "roof boiler", "inspect": "premises flat", "return": "deposit keys"}),
    "lender": ("borrower", {"release": "loan collateral", "assign": "claim loan", "waive": "fee interest"}),
    "borrower": ("lender", {"repay": "loan interest", "pledge": "collateral shares", "pay": "fee interest"}),
    "seller": ("buyer", {"deliver": "goods title", "insure": "goods cargo", "disclose": "defects liens"}),
    "buyer": ("seller", {"accept": "goods title", "pay": "price fee", "inspect": "goods cargo"}),
}
TABLES = {
    "orders": "price date weight", "staff": "salary age grade", "books": "price year pages", "flights": "date distance seats",
    "houses": "price age rooms", "students": "grade age credits",
}  # fmt: skip
OPERATORS = {"above": ">", "below": "<", "exactly": "="}
VALUES = "5 15 25 50 100 500".split()
DOSES = [dose for _, _, dose, _ in DISEASES.values()]
TERMS = {"5": 1, "10": 2, "30": 3}  # days -> weight
FRAMES = {  # the words between the technical ones
    "clinic": "patient reports and for days : likely give mg once twice thrice daily ;".split(),
    "contract": "under clause shall may must not within after notice to of without consent ,".split(),
    "query": "show every with select from".split(),
}
SPECIAL = ["<pad>", "<bos>", "<unk>"]


class World:
    """The people and their facts, drawn from ``seed``, and the four sources of text over one closed vocabulary."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.city = {name: rng.choice(list(CITIES)) for name in NAMES}
        self.job = {name: rng.choice(JOBS) for name in NAMES}
        self.pet = {name: rng.choice(PETS) for name in NAMES}
        self.sources = {domain: Source((domain,), self.transitions) for domain in DOMAINS}
        words = dict.fromkeys(word for domain in DOMAINS for word in self.sources[domain].words())
        self.vocabulary = SPECIAL + sorted(words)
        self.ids = {word: i for i, word in enumerate(self.vocabulary)}

    # The grammar. A state is a tuple: the domain, where in which kind of sentence we are, and what must be remembered.
    # (domain, "say", w1, w2, …) is the state in which those words follow and then the sentence ends.

    def transitions(self, state: State) -> Transitions:
        """The words that can follow ``state``, their probabilities, and the states after them."""
        domain, *rest = state
        if rest[:1] == ["say"]:
            _, word, *following = rest
            return emit(word, (domain, "say", *following) if following else (domain,))  # after the last word the sentence ends
        return {"general": self._general, "clinic": self._clinic, "legal": self._legal, "sql": self._sql}[domain](*rest)

    def _general(self, at: str = "start", *memory: str) -> Transitions:
        def go(place: str, *remember: str) -> State:
            return ("general", place, *remember)

        match at, *memory:
            case ("start",):
                return mixture(
                    (0.18, uniform(NAMES, lambda name: go("person", name))),
                    (0.24, weighted({"where": 1, "what": 2}, lambda word: go(word))),
                    (0.06, uniform(CITIES, lambda city: go("say", "lies", "in", CITIES[city], "."))),
                    (0.20, emit("the", go("subject"))),
                    (0.12, uniform(map(str, range(10)), lambda a: go("operator", a))),
                    (0.06, uniform(self.kinds(), lambda word: go("say", "means", self.kinds()[word], "."))),
                    (0.05, emit("list", go("first item"))),
                    (0.09, emit("repeat", go("first word"))),
                )
            case ("person", name):
                rest = {"lives": ("in", self.city[name]), "works": ("as", "a", self.job[name]), "owns": ("a", self.pet[name])}
                return uniform(rest, lambda verb: go("say", *rest[verb], "."))
            case ("where",):
                return weighted({"does": 4, "is": 1}, lambda word: go("who", "live") if word == "does" else go("which city"))
            case ("what",):
                return uniform(("job", "pet"), lambda word: go("does", "have" if word == "job" else "own"))
            case ("does", verb):
                return emit("does", go("who", verb))
            case ("who", verb):
                facts = {"live": self.city, "have": self.job, "own": self.pet}[verb]
                return uniform(NAMES, lambda name: go("say", verb, "?", facts[name], "."))
            case ("which city",):
                return uniform(CITIES, lambda city: go("say", "?", CITIES[city], "."))
            case ("subject",):
                nouns = uniform(self._nouns(), lambda noun: go("after subject", *self._nouns()[noun]))
                return mixture((0.3, uniform(ADJECTIVES, lambda _: go("noun"))), (0.7, nouns))
            case ("noun",):
                return uniform(self._nouns(), lambda noun: go("after subject", *self._nouns()[noun]))
            case ("after subject", kind, number):
                return mixture((0.4, uniform(PREPOSITIONS, lambda _: go("near", kind, number))), (0.6, self._verbs(kind, number)))
            case ("near", kind, number):
                return emit("the", go("attractor", kind, number))
            case ("attractor", kind, number):
                return uniform(self._nouns(), lambda _: go("verb", kind, number))  # this noun must not change the verb
            case ("verb", kind, number):
                return self._verbs(kind, number)
            case ("after verb",):
                return mixture((0.5, emit(".", ("general",))), (0.5, uniform(ADVERBS, lambda _: go("say", "."))))
            case ("operator", a):
                return uniform(("plus", "minus"), lambda word: go("operand", a, word))
            case ("operand", a, "plus"):
                return uniform(map(str, range(10)), lambda b: go("say", "is", str(int(a) + int(b)), "."))
            case ("operand", a, "minus"):
                return uniform(map(str, range(int(a) + 1)), lambda b: go("say", "is", str(int(a) - int(b)), "."))
            case ("first item",):
                return mixture(
                    *((1 / 3, uniform(words, lambda _, field=field: go("item", field))) for field, words in self.fields().items())
                )
            case ("item", field):
                return mixture((0.25, emit(".", ("general",))), (0.75, uniform(self.fields()[field], lambda _: go("item", field))))
            case ("first word",):
                fields = self.fields().items()
                return mixture(
                    *((1 / 3, uniform(words, lambda one, field=field: go("second word", field, one))) for field, words in fields)
                )
            case ("second word", field, one):
                return uniform(self.fields()[field], lambda two: go("say", ":", one, two, "."))
        raise ValueError(f"no such state: {at!r} {memory!r}")

    @staticmethod
    @functools.cache
    def _nouns() -> dict[str, tuple[str, str]]:
        """noun -> its kind and number."""
        kinds, numbers = {"animate": ANIMATE, "machine": MACHINES}, ("singular", "plural")
        return {
            noun: (kind, number)
            for kind, nouns in kinds.items()
            for forms in nouns.items()
            for noun, number in zip(forms, numbers, strict=True)
        }

    @staticmethod
    def _verbs(kind: str, number: str) -> Transitions:
        verbs = ANIMATE_VERBS if kind == "animate" else MACHINE_VERBS
        return uniform(verbs if number == "singular" else verbs.values(), lambda _: ("general", "after verb"))

    @staticmethod
    @functools.cache
    def kinds() -> dict[str, str]:
        """Each word that a downstream domain brings, and what kind of word it is. The general domain says so: none is new to the model."""
        found = {}
        for disease, (symptoms, drug, _, _) in DISEASES.items():
            found |= {disease: "disease", drug: "drug"} | dict.fromkeys(symptoms.split(), "symptom")
        for party, (_, verbs) in PARTIES.items():
            found |= {party: "party"} | dict.fromkeys(verbs, "duty") | dict.fromkeys(" ".join(verbs.values()).split(), "thing")
        for table, columns in TABLES.items():
            found |= {table: "table"} | dict.fromkeys(columns.split(), "column")
        found |= dict.fromkeys(OPERATORS, "relation") | dict.fromkeys(OPERATORS.values(), "sign")
        found |= dict.fromkeys([number for number in (*VALUES, *DOSES, *TERMS) if int(number) > 18], "value")  # sums know the smaller ones
        return found | {word: field for field, words in FRAMES.items() for word in words}

    @classmethod
    @functools.cache
    def fields(cls) -> dict[str, list[str]]:
        """The technical words by field: clinic, contract, query. The general domain lists and repeats them, a field at a time, so that the
        model can say each of them and expects it among its own kind."""
        field = {"disease": "clinic", "drug": "clinic", "symptom": "clinic", "party": "contract", "duty": "contract", "thing": "contract"}
        field |= dict.fromkeys(("table", "column", "relation", "sign", "value"), "query") | {name: name for name in FRAMES}
        return {name: [word for word, kind in cls.kinds().items() if field[kind] == name] for name in FRAMES}

    def _clinic(self, at: str = "start", *memory: str) -> Transitions:
        def go(place: str, *remember: str) -> State:
            return ("clinic", place, *remember)

        match at, *memory:
            case ("start",):
                return emit("patient", go("name"))
            case ("name",):
                return uniform(NAMES, lambda _: go("reports"))
            case ("reports",):
                return emit("reports", go("symptom"))
            case ("symptom",):
                symptoms = {symptom: disease for disease, entry in DISEASES.items() for symptom in entry[0].split()}
                return uniform(symptoms, lambda symptom: go("and", symptoms[symptom], symptom))
            case ("and", disease, first):
                return weighted({"and": 2, "for": 1}, lambda word: go("second", disease, first) if word == "and" else go("days", disease))
            case ("second", disease, first):
                return uniform([symptom for symptom in DISEASES[disease][0].split() if symptom != first], lambda _: go("for", disease))
            case ("for", disease):
                return emit("for", go("days", disease))
            case ("days", disease):
                _, drug, dose, often = DISEASES[disease]
                plan = f"days : likely {disease} ; give {drug} {dose} mg {often} daily .".split()
                return uniform(map(str, range(2, 8)), lambda _: go("say", *plan))
        raise ValueError(f"no such state: {at!r} {memory!r}")

    def _legal(self, at: str = "start", *memory: str) -> Transitions:
        def go(place: str, *remember: str) -> State:
            return ("legal", place, *remember)

        match at, *memory:
            case ("start",):
                return emit("under", go("clause"))
            case ("clause",):
                return emit("clause", go("number"))
            case ("number",):
                return uniform(map(str, range(1, 10)), lambda _: go("comma"))
            case ("comma",):
                return emit(",", go("the"))
            case ("the",):
                return emit("the", go("party"))
            case ("party",):
                return uniform(PARTIES, lambda party: go("modal", party))
            case ("modal", party):
                return weighted({"shall": 4, "may": 3, "must": 1}, lambda word: go("not" if word == "must" else "verb", party, word))
            case ("not", party, modal):
                return emit("not", go("verb", party, modal))
            case ("verb", party, modal):
                verbs = PARTIES[party][1]
                return uniform(verbs, lambda verb: go("object's the", party, modal, verbs[verb]))
            case ("object's the", party, modal, things):
                return emit("the", go("object", party, modal, things))
            case ("object", party, modal, things):  # a duty has a term, a right needs notice, a ban has an exception
                other = PARTIES[party][0]
                may, must = ("after", "notice", "to", "the", other, "."), ("without", "consent", "of", "the", other, ".")
                then = {"shall": go("within"), "may": go("say", *may), "must": go("say", *must)}[modal]
                return uniform(things.split(), lambda _: then)
            case ("within",):
                return emit("within", go("term"))
            case ("term",):
                return weighted(TERMS, lambda _: go("say", "days", "."))
        raise ValueError(f"no such state: {at!r} {memory!r}")

    def _sql(self, at: str = "start", *memory: str) -> Transitions:
        def go(place: str, *remember: str) -> State:
            return ("sql", place, *remember)

        match at, *memory:
            case ("start",):
                return emit("show", go("column"))
            case ("column",):
                columns = dict.fromkeys(column for entry in TABLES.values() for column in entry.split())
                return uniform(columns, lambda column: go("of", column))
            case ("of", column):
                return emit("of", go("every", column))
            case ("every", column):
                return emit("every", go("table", column))
            case ("table", column):
                return uniform([table for table in TABLES if column in TABLES[table].split()], lambda table: go("with", column, table))
            case ("with", column, table):
                return emit("with", go("filter", column, table))
            case ("filter", column, table):
                others = [other for other in TABLES[table].split() if other != column]
                return uniform(others, lambda other: go("relation", column, table, other))
            case ("relation", *known):
                return uniform(OPERATORS, lambda relation: go("value", *known, OPERATORS[relation]))
            case ("value", column, table, other, sign):
                query = f": select {column} from {table} where {other} {sign}".split()
                return uniform(VALUES, lambda value: go("say", *query, value, ";"))
        raise ValueError(f"no such state: {at!r} {memory!r}")

    # Text.

    def sample(self, domain: str, rows: int, length: int, seed: int) -> Tensor:
        """Fresh text: (rows, length) token ids; each row is <bos> and then sentences, the last one possibly cut off."""
        source, rng = self._source(domain), random.Random(f"{domain} {seed}")
        if length < 2:
            raise ValueError(f"length must be at least 2 (<bos> and one word), got {length}")
        bos = self.ids["<bos>"]
        texts = [source.sample(length - 1, rng) for _ in range(rows)]
        return torch.tensor([[bos, *map(self.ids.get, words)] for words in texts]).reshape(rows, length)

    def text(self, ids: Tensor) -> str:
        """The words of one row of ids, without <bos>."""
        return " ".join(self.vocabulary[i] for i in ids.tolist() if i != self.ids["<bos>"])

    def log_probs(self, domain: str, ids: Tensor) -> Tensor:
        """Exact log-probability (nats) of each token of rows from :meth:`sample`: (rows, length) ids -> (rows, length − 1) float64."""
        source = self._source(domain)
        logs = [source.log_probs(self.vocabulary[i] for i in row[1:]) for row in ids.tolist()]
        return torch.tensor(logs, dtype=torch.float64)

    @functools.cache  # noqa: B019  a handful of worlds live as long as the process
    def floor(self, domain: str, length: int) -> float:
        """Entropy of rows of ``length`` tokens in nats per predicted token: no model's expected loss is lower. Exact."""
        return self._source(domain).entropy(length - 1) / (length - 1)

    def facts(self) -> list[tuple[str, str]]:
        """Questions about people and places, and the one word that answers each: ("where does mira live ?", "oslo")."""
        asked = ("where does", "live", self.city), ("what job does", "have", self.job), ("what pet does", "own", self.pet)
        people = [(f"{question} {name} {verb} ?", fact[name]) for question, verb, fact in asked for name in NAMES]
        return people + [(f"where is {city} ?", country) for city, country in CITIES.items()]

    def _source(self, domain: str) -> Source:
        if domain not in self.sources:
            raise ValueError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
        return self.sources[domain]

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word; words are separated by spaces; <bos> is put in front."""
        words = Tokenizer(models.WordLevel(self.ids, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", self.ids["<bos>"])])
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")
