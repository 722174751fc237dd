"""Say in words how much an update damaged, by the general prompts asked before and after it."""

from __future__ import annotations

from forgetlearn.storage.records import GeneralAnswer, OnPrompts

# Damage is bad above this KL (nats per token) or below this agreement (percent of tokens). Measured on a chat model of
# 135 million parameters: updates after which simple questions got wrong answers were at KL 0.4 and more, agreement 76
# and less; those that kept the rest were below 0.08 and above 85. The bounds lie between.
BAD_KL = 0.1
BAD_AGREEMENT = 85.0
KEEP_MORE = "To keep more, {}, update fewer facts at once, or forget with a smaller coefficient."
OWN_PROMPTS = "give prompts of your own (--keep FILE)"
KEEP_AT_ALL = "take the default recipe, which keeps other answers (keep.weight)"
N_EXAMPLES = 3


def is_bad(found: OnPrompts) -> bool:
    """Return True if the damage is beyond one of the bounds."""
    return (found.kl or 0) > BAD_KL or (found.agreement is not None and found.agreement < BAD_AGREEMENT)


def in_words(found: OnPrompts) -> str:
    """Return the numbers of a comparison in one sentence, without a full stop."""
    if found.agreement is None or found.kl is None:
        return f"none of {found.asked} general prompts could be compared"
    return (
        f"asked {found.compared} general prompts, the model chooses {found.agreement:.1f} % of the tokens as before "
        f"(KL {found.kl:.3g} nats per token)"
    )


def warning(found: OnPrompts | None, *, kept: bool) -> str | None:
    """Return a warning if the damage is bad, else None. `kept` tells whether training kept other answers."""
    if found is None or not is_bad(found):
        return None
    return f"Damage: {in_words(found)}, so it answers other questions differently too. {advice(kept=kept)}"


def advice(*, kept: bool) -> str:
    """Return what to do for less damage. `kept` tells whether training kept other answers."""
    return KEEP_MORE.format(OWN_PROMPTS if kept else KEEP_AT_ALL)


def examples(found: OnPrompts | None) -> list[str]:
    """Return the answers to general prompts that changed most, worst first: a sentence each."""
    compared = [answer for answer in found.answers if answer.before is not None] if found else []
    return [example(answer) for answer in compared if answer.said != answer.before][:N_EXAMPLES]


def example(answer: GeneralAnswer) -> str:
    """Return a prompt with the answers before and now, each on one line and shortened."""
    now = answer.error or f"now {_short(answer.said)}"
    return f"{_short(shown_prompt(answer))} was answered {_short(answer.before)}, {now}."


def shown_prompt(answer: GeneralAnswer) -> str:
    """Return a prompt as one text; the turns of a chat become lines."""
    return answer.prompt if isinstance(answer.prompt, str) else "\n".join(answer.prompt)


def _short(text: str | None) -> str:
    words = " ".join((text or "").split())
    return f"“{words[:80]}{'…' if len(words) > 80 else ''}”"
