"""Controls change as much as forgetting does, and only that."""

import torch
from torch import tensor

from forgetlearn.method.controls import controlled

BASE = {"w": tensor([[3.0, 4.0], [0.0, 2.0]]), "still": tensor([1.0])}
FORGOTTEN = {"w": tensor([[3.0, 4.0], [3.0, 2.0]]), "still": tensor([1.0])}


def made(control, seed=0):
    return dict(controlled(BASE, FORGOTTEN.items(), control, seed))


def test_none_is_forgetting_itself():
    assert all(made("none")[name] is FORGOTTEN[name] for name in BASE)


def test_reinforce_goes_the_other_way():
    assert torch.equal(made("reinforce")["w"], tensor([[3.0, 4.0], [-3.0, 2.0]]))


def test_row_norms_keeps_directions():
    assert torch.allclose(made("row-norms")["w"], tensor([[3.0, 4.0], [0.0, 13**0.5]]))


def test_directions_keep_the_lengths_of_rows():
    half = 2 / 13**0.5
    assert torch.allclose(made("directions")["w"], tensor([[3.0, 4.0], [3 * half, 2 * half]]))
    short = dict(controlled(BASE, {"w": BASE["w"] * 0}.items(), "directions", 0))
    assert torch.equal(short["w"], BASE["w"])  # what has no direction left stays


def test_centred_leaves_out_what_all_rows_share():
    assert torch.equal(made("centred")["w"], tensor([[1.5, 4.0], [1.5, 2.0]]))


def test_random_has_the_norm_of_the_change_and_the_seed_decides():
    moved = made("random")["w"] - BASE["w"]
    assert torch.allclose(moved.norm(), tensor(3.0))
    assert not torch.allclose(moved, FORGOTTEN["w"] - BASE["w"], atol=0.1)
    assert torch.equal(made("random")["w"], made("random")["w"])
    assert not torch.equal(made("random")["w"], made("random", seed=1)["w"])


def test_random_leaves_rows_that_do_not_change():
    assert torch.equal(made("random")["w"][0], BASE["w"][0])


def test_what_does_not_change_stays_to_the_bit():
    assert all(torch.equal(made(control)["still"], BASE["still"]) for control in ("random", "reinforce", "row-norms"))
