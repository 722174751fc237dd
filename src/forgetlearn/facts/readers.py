"""Turn a record into drafts of facts: one reader for flat records, and one for each nested form.

A reader only says which field is which; selection.py decides what is stripped, kept or left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

from forgetlearn.errors import FactError, some
from forgetlearn.facts.fact import LocalityProbe, Probe, fact_id
from forgetlearn.facts.fields import NO_ANSWER, Answer, Fields, Record, as_text, first_text, kind
from forgetlearn.facts.names import NUMBERED, misspelt

VERBS = (" is followed by ", " is ", " are ", " follows ")  # before the answer in RippleEdits' sentences
RIPPLE_LOCALITY = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
RIPPLE_PROBES = ("Logical_Generalization", "Compositionality_I", "Compositionality_II")
PROBE_FIELDS = frozenset({"kind", "prompt", "answer", "old_answer", "options", "needs"})
LONGEST_KIND = 40
HOPS = range(2, 7)  # of HalluEditBench's questions
LETTERED = re.compile(r"(?:^|\s{2,})[A-Z]\. ")  # between the options of "A. marble  B. granite"


@dataclass(frozen=True)
class Draft:
    """A fact as its record gives it: texts are unchanged, and "" or an empty list stands for what is missing."""

    prompt: str
    new: Answer
    old: Answer = NO_ANSWER
    pred: str = ""  # ZsRE only: the prediction of the original paper's model
    subject: str = ""
    rephrases: Sequence[str] = ()
    locality: Sequence[tuple[str, str]] = ()
    probes: Sequence[Probe] = ()
    probes_need: Sequence[tuple[str, str]] = ()  # the facts, as (prompt, new answer), that the probes follow from
    where: str = ""  # file and record, for a message
    is_one_turn: bool = True  # False for a chat that is not one question and one answer
    is_old_alone: bool = False  # True for a record without a field for the new answer


@dataclass(frozen=True)
class Flat:
    """Reads flat records. Each attribute is the name of the field that holds a part of a fact, "" if there is none."""

    prompt: str
    new: str
    old: str = ""
    pred: str = ""
    subject: str = ""
    rephrases: str = ""
    probe: str = ""
    probe_answer: str = ""
    probes: str = ""  # a list of probes

    def __call__(self, fields: Fields) -> Draft:
        """Return the draft of a record."""
        probe = (fields.text(self.probe), fields.text(self.probe_answer))
        return Draft(
            prompt=fields.text(self.prompt),
            new=fields.answer(self.new),
            old=fields.answer(self.old),
            pred=fields.text(self.pred),
            subject=fields.text(self.subject),
            rephrases=fields.texts(self.rephrases),
            locality=[probe, *_locality(fields, self.probes)],
        )


def read_nested(fields: Fields) -> Draft:
    """Read COUNTERFACT as published. The answer to each neighbourhood prompt is the old answer."""
    rewrite = fields.inner("requested_rewrite")
    old = rewrite.inner("target_true").text("str")
    return Draft(
        prompt=_filled(rewrite, needed=True),
        new=Answer(rewrite.inner("target_new").text("str")),
        old=Answer(old),
        subject=rewrite.text("subject"),
        rephrases=fields.texts("paraphrase_prompts"),
        locality=[(prompt, old) for prompt in fields.texts("neighborhood_prompts")],
    )


def _filled(fields: Fields, needed: bool = False) -> str:
    """Return the prompt with the subject in place of `{}`; with `needed`, raise FactError if there is no `{}`."""
    template, subject = fields.text("prompt"), fields.text("subject").strip()
    if "{}" not in template:
        if needed and template.strip():
            raise FactError(f"{fields.place('prompt')} has no {{}} for the subject: {template[:60]!r}.")
        return template
    if not subject:
        raise FactError(
            f"{fields.place('subject')} is empty, and the prompt has a {{}} for it: {template[:60]!r}. "
            "Give the subject, or write the prompt out."
        )
    return template.replace("{}", subject)


def read_mquake(fields: Fields) -> list[Draft]:
    """Read MQuAKE: each edit of a case is a fact, and the edit's question is its rephrasing.

    An edit's answers take their aliases from the single hop that asks the same question. The case's multi-hop
    questions, which follow from all its edits, are probes of its last one.
    """
    old_hops, new_hops = fields.objects("single_hops"), fields.objects("new_single_hops")
    drafts = [
        Draft(
            prompt=_filled(rewrite, needed=True),
            new=_hop_answer(rewrite, "target_new", new_hops),
            old=_hop_answer(rewrite, "target_true", old_hops),
            subject=rewrite.text("subject"),
            rephrases=[rewrite.text("question")],
            where=f"{fields.where}, edit {number}",
        )
        for number, rewrite in enumerate(fields.objects("requested_rewrite"), 1)
    ]
    new, old = ((fields.text(name), *fields.texts(f"{name}_alias")) for name in ("new_answer", "answer"))
    hops = len(new_hops or old_hops or drafts)
    probes = [Probe(f"{hops}-hop", question, new, old) for question in fields.texts("questions")]
    needs = [(draft.prompt.strip(), draft.new.text.strip()) for draft in drafts]
    return [*drafts[:-1], *(replace(draft, probes=probes, probes_need=needs) for draft in drafts[-1:])]


def _hop_answer(rewrite: Fields, name: str, hops: Sequence[Fields]) -> Answer:
    """Return an answer of an edit, with the aliases in those hops that have the same question and answer."""
    question, text = rewrite.text("question"), rewrite.inner(name).text("str")
    same = (hop for hop in hops if hop.text("question") == question and hop.text("answer") == text)
    return Answer(text, tuple(alias for hop in same for alias in hop.texts("answer_alias")))


def read_knowedit(fields: Fields) -> Draft:
    """Read KnowEdit, with every group of locality and portability. Accepted answers but the first are aliases."""
    locality, portability = fields.inner("locality"), fields.inner("portability")
    return Draft(
        prompt=fields.text("prompt") or fields.text("text"),
        new=fields.answer("target_new" if fields.answer("target_new").text else "labels"),
        old=fields.answer("ground_truth"),
        subject=fields.text("subject") or fields.text("concept"),
        rephrases=fields.texts("rephrase_prompt") or fields.texts("rephrase"),
        locality=[probe for group in locality.record for probe in _locality(locality, group)],
        probes=[probe for group in portability.record for probe in _portability(portability, group)],
    )


def read_own(fields: Fields) -> Draft:
    """Read a record with forgetlearn's own field names; flat COUNTERFACT uses some of them."""
    if wrong := misspelt(tuple(fields.record)):
        raise FactError(f"{fields.where}: unknown field '{wrong[0]}'. Did you mean '{wrong[1]}'?")
    rephrases = [*fields.texts("rephrase_prompt"), *fields.texts("rephrase_prompts")]
    rephrases += [fields.text(f"rephrase_prompt_{n}") for n in _numbers(fields.record, "rephrase_prompt")]
    new, old, subject = fields.answer("target_new"), fields.answer("ground_truth"), fields.text("subject")
    ids = [fact_id(subject, fields.text("prompt"), text) for text in ({new.text} if new.text else {"", old.text})]
    is_written_by_us = fields.record.get("id") in ids
    return Draft(
        prompt=fields.text("prompt") if is_written_by_us else _filled(fields),  # `write_facts` has filled in {}
        new=new,
        old=old,
        subject=subject,
        rephrases=rephrases,
        locality=list(_own_locality(fields)),
        probes=list(_own_probes(fields)),
    )


def _own_locality(fields: Fields) -> Iterator[tuple[str, str]]:
    prompts, answers = fields.texts("locality_prompt"), fields.texts("locality_ground_truth")
    if len(prompts) != len(answers) and any(prompts + answers):
        raise FactError(
            f"{fields.where}: {len(prompts)} in 'locality_prompt' and {len(answers)} in "
            "'locality_ground_truth'. Each probe needs its answer."
        )
    yield from zip(prompts, answers, strict=False)  # the lengths differ only if all are empty
    for n in _numbers(fields.record, "locality_prompt", "locality_ground_truth"):
        yield fields.text(f"locality_prompt_{n}"), fields.text(f"locality_ground_truth_{n}")
    yield from _locality(fields, "locality")


def _own_probes(fields: Fields) -> Iterator[Probe]:
    """Yield the probes of a record of the own form."""
    for item in fields.objects("probes"):
        if unknown := sorted(item.record.keys() - PROBE_FIELDS):
            raise FactError(
                f"{item.place(unknown[0])} is not a field of a probe. Known are {', '.join(sorted(PROBE_FIELDS))}."
            )
        kind = item.text("kind").strip()
        if not kind or len(kind) > LONGEST_KIND:
            raise FactError(
                f"{item.place('kind')} is {kind[:50]!r}. Name what the probe tests, such as 2-hop or reversed, in at "
                f"most {LONGEST_KIND} characters."
            )
        if len(options := item.texts("options")) > len(ascii_uppercase):
            raise FactError(f"{item.place('options')} has {len(options)}: expected at most {len(ascii_uppercase)}.")
        yield Probe(
            kind=kind,
            prompt=item.text("prompt"),
            answers=_all_texts(item.answer("answer")),
            old_answers=_all_texts(item.answer("old_answer")),
            options=tuple(options),
            needs=tuple(LocalityProbe(each.text("prompt"), each.text("answer")) for each in item.objects("needs")),
        )


def _all_texts(answer: Answer) -> tuple[str, ...]:
    return (answer.text, *answer.aliases)


def _portability(fields: Fields, group: str) -> Iterator[Probe]:
    """Yield the probes of a group of KnowEdit: questions whose answers follow from the fact."""
    for item in fields.objects(group):
        yield Probe(_as_kind(group), item.text("prompt"), _all_texts(item.answer("ground_truth")))


def _as_kind(name: str) -> str:
    """Return a name of a group in a file as a kind of probe: `Logical_Generalization` is `logical-generalization`."""
    return name.strip().replace("_", "-").casefold()[:LONGEST_KIND]


def _locality(fields: Fields, name: str) -> Iterator[tuple[str, str]]:
    """Yield the locality probes of a list, each an object or a pair of prompt and answer."""
    place = fields.place(name)
    for item in fields.items(name):
        if isinstance(item, Mapping):
            prompt = next((item[name] for name in ("prompt", "loc") if name in item), None)
            answer = next((item[name] for name in ("answer", "ground_truth", "loc_ans") if name in item), None)
            yield first_text(prompt, f"{place}, prompt"), first_text(answer, f"{place}, answer")
        elif isinstance(item, list | tuple) and len(item) == 2:
            yield as_text(item[0], f"{place}, prompt"), as_text(item[1], f"{place}, answer")
        else:
            raise FactError(f"{place} holds {kind(item)}. Each probe is an object or a pair of prompt and answer.")


def _numbers(record: Record, *bases: str) -> list[str]:
    """Return the numbers n of the fields `base_n`, in order, as text because a number may be too long for int."""
    found = (NUMBERED.fullmatch(name) for name in record)
    numbers = {match[0][len(match[1]) + 1 :] for match in found if match and match[1] in bases}
    return sorted(numbers, key=lambda digits: (len(digits), digits))


def read_rippleedits(fields: Fields) -> Draft:
    """Read RippleEdits: an edit is a whole sentence that ends with the new answer.

    The answer's name and aliases come from a query of the record whose target has the same Wikidata id. If there is
    none, the sentence is divided after its last `is`, `are`, `follows` or `is followed by`.
    """
    edit = fields.inner("edit")
    before = edit.inner("previous_fact")
    known = _ripple_answers(fields)
    new_names, old_names = (known.get(part.text("target_id"), []) for part in (edit, before))
    prompt, new = _divided(edit.text("prompt"), new_names)
    sentence = before.text("prompt").strip()
    old = sentence[len(prompt) :].strip().removesuffix(".") if prompt and sentence.startswith(prompt) else ""
    aliasing = _queries(fields, ["Subject_Aliasing"], "test_queries")
    return Draft(
        prompt=prompt or edit.text("prompt"),
        new=Answer(new, tuple(new_names[1:])),
        old=Answer(old, tuple(old_names[1:])),
        rephrases=[query.text("prompt") for query in aliasing if query.text("relation") == edit.text("relation")],
        locality=[
            (query.text("prompt"), names[0][0])
            for query in _queries(fields, RIPPLE_LOCALITY, "test_queries")
            if (names := _ripple_names(query))
        ],
        probes=[
            Probe(_as_kind(name), query.text("prompt"), tuple(text for names in _ripple_names(query) for text in names))
            for name in RIPPLE_PROBES
            for query in _queries(fields, [name], "test_queries")
        ],
    )


def _divided(sentence: str, names: Sequence[str]) -> tuple[str, str]:
    """Split a sentence into prompt and answer; return two empty texts if it cannot be split."""
    stated = sentence.strip().removesuffix(".")
    if names and stated.endswith(f" {names[0]}"):
        return stated[: -len(names[0])].strip(), names[0]
    place, verb = max((stated.rfind(verb), verb) for verb in VERBS)
    if place < 1:
        return "", ""
    return stated[:place] + verb.rstrip(), stated[place + len(verb) :].strip()


def _queries(fields: Fields, tests: Iterable[str], *kinds: str) -> Iterator[Fields]:
    """Yield the queries of the given kinds from the tests in the given lists."""
    for test in (test for name in tests for test in fields.objects(name)):
        for query_kind in kinds:
            yield from test.objects(query_kind)


def _ripple_names(query: Fields) -> list[list[str]]:
    """Return the answers of a query, each as a list of its name and its aliases."""
    return [[answer.text("value"), *answer.texts("aliases")] for answer in query.objects("answers")]


def _ripple_answers(fields: Fields) -> dict[str, list[str]]:
    """Return Wikidata id -> name and aliases, from all queries of a record."""
    found: dict[str, list[str]] = {}
    tests = [name for name, value in fields.record.items() if isinstance(value, list)]
    for query in _queries(fields, tests, "test_queries", "condition_queries"):
        ids = query.texts("second_hop_target_ids") or query.texts("target_ids")
        for target, names in zip(ids, _ripple_names(query), strict=False):
            found.setdefault(target, names)
    return found


def read_halluedit(fields: Fields) -> Draft:
    """Read HalluEditBench: `object` is the new answer, the reply of the file's model (`output_<model>`) the old one."""
    outputs = sorted(name for name in fields.record if name.startswith("output_"))
    if len(outputs) > 1:
        raise FactError(
            f"{fields.where} has replies of {len(outputs)} models: {some(outputs)}. Say which is the old answer: "
            f"--columns prompt=question,target_new=object,ground_truth={outputs[0]}."
        )
    draft = Flat("question", "object", old=outputs[0], subject="subject", rephrases="paraphrased_question")(fields)
    return replace(draft, probes=list(_hallu_probes(fields, draft)))


def _hallu_probes(fields: Fields, draft: Draft) -> Iterator[Probe]:
    """Yield the probes of HalluEditBench; the answer to its reversed question is the subject."""
    new, old, subject = (draft.new.text,), (draft.old.text,), (draft.subject,)
    options = LETTERED.split(fields.text("multiple_choice_with_letters"))[1:]
    if options:
        yield Probe("multiple-choice", draft.prompt, new, old, options=tuple(options))
    yield Probe("yes-no", fields.text("yes_question"), ("Yes",), ("No",))
    yield Probe("yes-no", fields.text("no_question"), ("No",), ("Yes",))
    yield Probe("reversed", fields.text("reversed_relation_question"), subject)
    for hops in HOPS:
        yield Probe(f"{hops}-hop", fields.text(f"question_{hops}hop"), (fields.text(f"answer_{hops}hop"),))


def read_alpaca(fields: Fields) -> Draft:
    """Read Alpaca: the prompt is the instruction, with the input on the next line; `output` is the new answer."""
    parts = (fields.text("instruction").strip(), fields.text("input").strip())
    return replace(Flat("instruction", "output")(fields), prompt="\n".join(filter(None, parts)))


def read_completion(fields: Fields) -> Draft:
    """Read a prompt and a completion, as texts or as lists of chat messages; the completion is the new answer."""
    if isinstance(fields.record["prompt"], list | tuple):
        return _chat([*fields.objects("prompt"), *fields.objects("completion")])
    return Flat("prompt", "completion")(fields)


def read_messages(fields: Fields) -> Draft:
    """Read a chat of one user message and the assistant's reply, the new answer. Other chats are left out."""
    return _chat(fields.objects("messages" if "messages" in fields.record else "conversations"))


def _chat(messages: Sequence[Fields]) -> Draft:
    roles = {"human": "user", "gpt": "assistant"}
    turns = [(turn.text("role") or turn.text("from"), _content(turn)) for turn in messages]
    turns = [(roles.get(role, role), text) for role, text in turns]
    if [role for role, _text in turns] == ["user", "assistant"]:
        return Draft(turns[0][1], Answer(turns[1][1]))
    return Draft(next((text for role, text in turns if role == "user"), ""), NO_ANSWER, is_one_turn=False)


def _content(turn: Fields) -> str:
    """Return the text of a message, which is given as one text or as parts of type text."""
    if not isinstance(turn.record.get("content"), list | tuple):
        return turn.text("content") or turn.text("value")
    return "".join(part.text("text") for part in turn.objects("content"))
