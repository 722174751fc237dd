"""Turn records into drafts of facts: one reader per common form.

A reader only says which field is which. What is kept, stripped or left out is decided in facts.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from forgetlearn.errors import FactError, some
from forgetlearn.facts.fields import Fields, Record, as_text, first_text, kind
from forgetlearn.facts.names import NUMBERED, misspelt

NOT_ONE_TURN = "not_one_turn"


@dataclass(frozen=True)
class Draft:
    """What one record says: texts as they stand in it, "" where it says nothing."""

    prompt: str
    new: str
    old: str = ""
    subject: str = ""
    pred: str = ""  # ZsRE only: what the model of the original paper said
    new_aliases: tuple[str, ...] = ()  # other ways to write the new answer that count as right
    old_aliases: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    probes: tuple[tuple[str, str], ...] = ()
    old_is_list: bool = False  # the old answer was given as a list: "None" in it is meant
    where: str = ""  # file and record, for a message
    why_not: str = ""  # the reason to leave it out, where its form alone says so
    placeholders: int = 0  # old answers that were "n/a" or the like; they are "" here


def fact_id(subject: str, prompt: str, target_new: str) -> str:
    """Return 16 hexadecimal digits of the content; the old answer, which a policy may change, does not count."""
    text = json.dumps(
        {"subject": subject, "prompt": prompt, "target_new": target_new}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# One reader per form -----------------------------------------------------------------------------


def read_zsre(fields: Fields) -> Draft:
    """ZsRE: the new answer is `alt`, the old one `answers[0]` (EasyEdit's convention, not ROME's)."""
    new, old = fields.answer("alt"), fields.answer("answers")
    return Draft(
        prompt=fields.text("src"),
        new=new.text,
        new_aliases=new.aliases,
        old=old.text,
        old_aliases=old.aliases,
        old_is_list=old.is_list,
        subject=fields.text("subject"),
        pred=fields.text("pred"),
        rephrases=tuple(fields.texts("rephrase")),
        probes=((fields.text("loc"), fields.text("loc_ans")),),
    )


def read_nested(fields: Fields) -> Draft:
    """COUNTERFACT as published: a neighbour's answer is the old answer."""
    rewrite = fields.inner("requested_rewrite")
    old = rewrite.inner("target_true").text("str")
    return Draft(
        prompt=_filled(rewrite, needed=True),
        new=rewrite.inner("target_new").text("str"),
        old=old,
        subject=rewrite.text("subject"),
        rephrases=tuple(fields.texts("paraphrase_prompts")),
        probes=tuple((prompt, old) for prompt in fields.texts("neighborhood_prompts")),
    )


def _filled(fields: Fields, needed: bool = False) -> str:
    """Return the prompt with the subject in place of `{}`; with `needed`, raise FactError if either is missing."""
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
    """MQuAKE: each edit of a case is a fact, and its question is another way to ask it.

    The aliases of an edit's answers are those of the single hop that asks the same question;
    `answer_alias` and `new_answer_alias` of the case belong to its multi-hop questions.
    """
    hops = {name: fields.objects(name) for name in ("single_hops", "new_single_hops")}
    drafts = []
    for number, rewrite in enumerate(fields.objects("requested_rewrite"), 1):
        question = rewrite.text("question")
        new, old = (rewrite.inner(name).text("str") for name in ("target_new", "target_true"))
        drafts.append(
            Draft(
                prompt=_filled(rewrite, needed=True),
                new=new,
                old=old,
                subject=rewrite.text("subject"),
                new_aliases=_hop_aliases(hops["new_single_hops"], question, new),
                old_aliases=_hop_aliases(hops["single_hops"], question, old),
                rephrases=(question,),
                where=f"{fields.where}, edit {number}",
            )
        )
    return drafts


def _hop_aliases(hops: Sequence[Fields], question: str, answer: str) -> tuple[str, ...]:
    """Return the aliases of the hops with this question and this answer."""
    same = (hop for hop in hops if hop.text("question") == question and hop.text("answer") == answer)
    return tuple(alias for hop in same for alias in hop.texts("answer_alias"))


def read_knowedit(fields: Fields) -> Draft:
    """KnowEdit: of several accepted answers the first one; locality probes of every group."""
    locality = fields.inner("locality")
    groups = [(locality, group, item) for group in locality.record for item in locality.items(group)]
    new, old = fields.answer("target_new"), fields.answer("ground_truth")
    new = new if new.text else fields.answer("labels")
    return Draft(
        prompt=fields.text("prompt") or fields.text("text"),
        new=new.text,
        new_aliases=new.aliases,
        old=old.text,
        old_aliases=old.aliases,
        old_is_list=old.is_list,
        subject=fields.text("subject") or fields.text("concept"),
        rephrases=tuple(fields.texts("rephrase_prompt") or fields.texts("rephrase")),
        probes=tuple(_probe(item, owner.place(group)) for owner, group, item in groups),
    )


def read_own(fields: Fields) -> Draft:
    """Read forgetlearn's own field names, some of which flat COUNTERFACT uses."""
    if wrong := misspelt(tuple(fields.record)):
        raise FactError(f"{fields.where}: unknown field '{wrong[0]}'. Did you mean '{wrong[1]}'?")
    rephrases = [*fields.texts("rephrase_prompt"), *fields.texts("rephrase_prompts")]
    rephrases += [fields.text(f"rephrase_prompt_{n}") for n in _numbers(fields.record, "rephrase_prompt")]
    new, old = fields.answer("target_new"), fields.answer("ground_truth")
    is_own = fields.record.get("id") == fact_id(fields.text("subject"), fields.text("prompt"), new.text)
    return Draft(
        prompt=fields.text("prompt") if is_own else _filled(fields),  # `write_facts` means its {} as it is written
        new=new.text,
        new_aliases=new.aliases,
        old=old.text,
        old_aliases=old.aliases,
        old_is_list=old.is_list,
        subject=fields.text("subject"),
        rephrases=tuple(rephrases),
        probes=tuple(_own_probes(fields)),
    )


def _own_probes(fields: Fields) -> Iterator[tuple[str, str]]:
    prompts, answers = fields.texts("locality_prompt"), fields.texts("locality_ground_truth")
    if len(prompts) != len(answers) and any(prompts + answers):
        raise FactError(
            f"{fields.where}: {len(prompts)} in 'locality_prompt' and {len(answers)} in "
            "'locality_ground_truth'. Each probe needs its answer."
        )
    yield from zip(prompts, answers, strict=False)  # of unequal length only where all are empty
    numbers = {*_numbers(fields.record, "locality_prompt"), *_numbers(fields.record, "locality_ground_truth")}
    for n in _in_order(numbers):
        yield fields.text(f"locality_prompt_{n}"), fields.text(f"locality_ground_truth_{n}")
    for item in fields.items("locality"):
        yield _probe(item, fields.place("locality"))


def _probe(item: object, place: str) -> tuple[str, str]:
    if isinstance(item, Mapping):
        prompt = next((item[name] for name in ("prompt", "loc") if name in item), None)
        answer = next((item[name] for name in ("answer", "ground_truth", "loc_ans") if name in item), None)
        return first_text(prompt, f"{place}, prompt"), first_text(answer, f"{place}, answer")
    if isinstance(item, list | tuple) and len(item) == 2:
        return as_text(item[0], f"{place}, prompt"), as_text(item[1], f"{place}, answer")
    raise FactError(f"{place} holds {kind(item)}. Each probe is an object or a pair of prompt and answer.")


def _numbers(record: Record, base: str) -> list[str]:
    """The numbers n of the fields `base_n`, in their order."""
    return _in_order({name[len(base) + 1 :] for name in record if NUMBERED.fullmatch(name) and name.startswith(base)})


def _in_order(numbers: set[str]) -> list[str]:
    """Sort numbers without leading zeros by size, however many digits they have."""
    return sorted(numbers, key=lambda digits: (len(digits), digits))


VERBS = (" is followed by ", " is ", " are ", " follows ")  # before the answer in RippleEdits' sentences
RIPPLE_PROBES = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")


def read_rippleedits(fields: Fields) -> Draft:
    """RippleEdits: an edit is a whole sentence that ends with the new answer, whose name is found by an id.

    The name and its aliases come from a query of the record that has the same id; where none has, the
    sentence is divided after its last `is`, `are`, `follows` or `is followed by`.
    """
    edit = fields.inner("edit")
    before = edit.inner("previous_fact")
    known = _ripple_answers(fields)
    prompt, new = _divided(edit.text("prompt"), known.get(edit.text("target_id"), []))
    sentence = before.text("prompt").strip()
    old = sentence[len(prompt) :].strip().removesuffix(".") if prompt and sentence.startswith(prompt) else ""
    aliasing = [query for test in fields.objects("Subject_Aliasing") for query in test.objects("test_queries")]
    tests = [test for name in RIPPLE_PROBES for test in fields.objects(name)]
    probes = [query for test in tests for query in test.objects("test_queries")]
    return Draft(
        prompt=prompt or edit.text("prompt"),
        new=new,
        new_aliases=tuple(known.get(edit.text("target_id"), [])[1:]),
        old=old,
        old_aliases=tuple(known.get(before.text("target_id"), [])[1:]),
        rephrases=tuple(query.text("prompt") for query in aliasing if query.text("relation") == edit.text("relation")),
        probes=tuple((query.text("prompt"), _ripple_names(query)[0][0]) for query in probes if _ripple_names(query)),
    )


def _divided(sentence: str, names: Sequence[str]) -> tuple[str, str]:
    """Split a sentence into prompt and answer; return "" and "" if it cannot be split."""
    stated = sentence.strip().removesuffix(".")
    if names and stated.endswith(f" {names[0]}"):
        return stated[: -len(names[0])].strip(), names[0]
    place, verb = max((stated.rfind(verb), verb) for verb in VERBS)
    if place < 1:
        return "", ""
    return stated[:place] + verb.rstrip(), stated[place + len(verb) :].strip()


def _ripple_names(query: Fields) -> list[list[str]]:
    """Return the answers of a query, each as its name and its aliases."""
    return [[answer.text("value"), *answer.texts("aliases")] for answer in query.objects("answers")]


def _ripple_answers(fields: Fields) -> dict[str, list[str]]:
    """Return names and aliases by Wikidata id, from all queries of a record."""
    found: dict[str, list[str]] = {}
    for name, value in fields.record.items():
        for test in fields.objects(name) if isinstance(value, list) else ():
            for query in [*test.objects("test_queries"), *test.objects("condition_queries")]:
                ids = query.texts("second_hop_target_ids") or query.texts("target_ids")
                for target, names in zip(ids, _ripple_names(query), strict=False):
                    found.setdefault(target, names)
    return found


def read_wikibigedit(fields: Fields) -> Draft:
    """WikiBigEdit: `ans` is new; the set has no old answers. Its pipeline writes ZsRE's names instead."""
    new = fields.answer("ans")
    return Draft(
        prompt=fields.text("update"),
        new=new.text,
        new_aliases=new.aliases,
        subject=fields.text("subject"),
        rephrases=tuple(fields.texts("rephrase")),
        probes=((fields.text("loc"), fields.text("loc_ans")),),
    )


def read_qaedit(fields: Fields) -> Draft:
    """QAEdit: `target` is new; it has no old answers. `locality` is a list of `loc` and `loc_ans`."""
    new = fields.answer("target")
    return Draft(
        prompt=fields.text("prompt"),
        new=new.text,
        new_aliases=new.aliases,
        subject=fields.text("subject"),
        rephrases=tuple(fields.texts("rephrase")),
        probes=tuple(_probe(item, fields.place("locality")) for item in fields.items("locality")),
    )


def read_halluedit(fields: Fields) -> Draft:
    """HalluEditBench: `object` is new; the reply of the file's model (`output_<model>`) is old."""
    outputs = sorted(name for name in fields.record if name.startswith("output_"))
    if len(outputs) > 1:
        raise FactError(
            f"{fields.where} has what {len(outputs)} models said: {some(outputs)}. Say which is the old answer: "
            f"--columns prompt=question,target_new=object,ground_truth={outputs[0]}."
        )
    new, old = fields.answer("object"), fields.answer(outputs[0])
    return Draft(
        prompt=fields.text("question"),
        new=new.text,
        new_aliases=new.aliases,
        old=old.text,
        old_aliases=old.aliases,
        old_is_list=old.is_list,
        subject=fields.text("subject"),
        rephrases=tuple(fields.texts("paraphrased_question")),
    )


def read_question_answer(fields: Fields) -> Draft:
    """TOFU and other questions with one answer each: the answer is the one to teach."""
    new = fields.answer("answer")
    rephrases = tuple(fields.texts("paraphrased_question"))
    return Draft(fields.text("question"), new.text, new_aliases=new.aliases, rephrases=rephrases)


def read_alpaca(fields: Fields) -> Draft:
    """Alpaca: the prompt is the instruction, with the input on the next line; `output` is new."""
    new = fields.answer("output")
    parts = (fields.text("instruction").strip(), fields.text("input").strip())
    return Draft("\n".join(filter(None, parts)), new.text, new_aliases=new.aliases)


def read_completion(fields: Fields) -> Draft:
    """Prompt and completion, as texts or as lists of chat messages: `completion` is new."""
    if isinstance(fields.record["prompt"], list | tuple):
        return _chat([*fields.objects("prompt"), *fields.objects("completion")])
    new = fields.answer("completion")
    return Draft(fields.text("prompt"), new.text, new_aliases=new.aliases)


def read_messages(fields: Fields) -> Draft:
    """Chat: one message of the user and the assistant's answer, which is new. Any other chat is left out."""
    return _chat(fields.objects("messages" if "messages" in fields.record else "conversations"))


def _chat(messages: Sequence[Fields]) -> Draft:
    roles = {"human": "user", "gpt": "assistant"}
    turns = [(turn.text("role") or turn.text("from"), _content(turn)) for turn in messages]
    said = [(roles.get(role, role), text) for role, text in turns]
    if [role for role, _text in said] == ["user", "assistant"]:
        return Draft(said[0][1], said[1][1])
    return Draft(next((text for role, text in said if role == "user"), ""), "", why_not=NOT_ONE_TURN)


def _content(turn: Fields) -> str:
    """Return the text of a message, given as one text or as parts of type text."""
    if not isinstance(turn.record.get("content"), list | tuple):
        return turn.text("content") or turn.text("value")
    return "".join(part.text("text") for part in turn.objects("content"))
