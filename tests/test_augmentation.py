"""What training draws: E2-LLM, PoSE, random positions, their statistics, and the keys that modules make."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ropex
from ropex import draws
from ropex.scaling import CLEX, PoSECollator
from ropex.scaling.pose import skipped
from tests.oracles import GOLDEN, TRAINED_LENGTH, logits, tiny_model, tiny_tokens, training_request
from tests.test_draws import chi_square

GEOMETRY = ropex.Geometry(dim=8, base=10_000.0, trained_length=16)
MANY = draws.sample_keys(1, torch.tensor(0), torch.arange(40_000))


def ask(method: str, tokens: int, keys: Tensor = MANY, **options: Any) -> ropex.Rotation:
    return ropex.schedule(method, **options).rotation(training_request(GEOMETRY, tokens, len(keys), key=keys))


def uniform_on(values: Tensor, low: int, high: int) -> None:
    """A chi-square test that these are uniform on {low .. high}."""
    assert (values.min().item(), values.max().item()) == (low, high)
    counts = (values - low).bincount(minlength=high - low + 1).double()
    assert high == low or abs(chi_square(counts, len(values) / len(counts))) < 4.5


# --- E2-LLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [9, 16, 50])
def test_e2llm_draws_g_and_the_offset_uniformly(tokens: int) -> None:
    positions, inv_freq, _ = ask("e2llm", tokens)
    g = (GEOMETRY.inv_freq() / inv_freq)[:, 0].round().to(torch.int64)[:, 0]
    uniform_on(g, 1, 20)
    offset = positions - torch.arange(tokens)
    assert (offset[:, :4] == 0).all(), "the first four tokens stay"
    assert (offset[:, 4:] == offset[:, 4:5]).all(), "one offset per sample"
    for value in (1, 2, 7, 20):
        uniform_on(offset[g == value, -1], 0, max(0, value * 16 - tokens))


def test_e2llm_gives_the_papers_positions() -> None:
    for case in json.loads((GOLDEN / "e2llm_positions.json").read_text())["cases"]:
        geometry = ropex.Geometry(8, 10_000.0, case["L"])
        schedule = ropex.schedule("e2llm")
        rotation = schedule.rotation(training_request(geometry, case["R"], len(MANY), key=MANY))
        g = (geometry.inv_freq() / rotation.inv_freq)[:, 0, 0].round()
        t = rotation.positions[:, -1] - case["R"] + 1
        row = int(((g == case["g"]) & (t == case["t"])).nonzero()[0])
        effective = rotation.positions[row] * rotation.inv_freq[row, 0, 0] / geometry.inv_freq()[0]
        torch.testing.assert_close(effective, torch.tensor(case["positions"], dtype=torch.float64), rtol=1e-12, atol=0)


def test_e2llm_serves_every_factor() -> None:
    theta = GEOMETRY.inv_freq()
    for length, g in ((1, 1), (16, 1), (17, 2), (32, 2), (33, 3), (16 * 40, 40)):
        rotation = ropex.schedule("e2llm").at(GEOMETRY, length=length)
        assert torch.equal(rotation.inv_freq.flatten(), theta / g)
        assert torch.equal(rotation.positions, torch.arange(length)[None])
    assert torch.equal(ropex.schedule("e2llm", factor=2.5).at(GEOMETRY, length=99).inv_freq, theta / 2.5)


# --- PoSE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_pose_draws_the_split_and_the_skip_uniformly(tokens: int) -> None:
    positions, inv_freq, _ = ask("pose", tokens, factor=8)
    assert torch.equal(inv_freq, GEOMETRY.inv_freq() / 8)
    skip = positions - torch.arange(tokens)
    assert (skip[:, 0] == 0).all()
    first = (skip == 0).sum(dim=-1)
    skips = skip[:, -1]
    if tokens > 1:
        uniform_on(skips, 0, 16 * 8 - tokens)
        uniform_on(first[skips > 0], 1, (tokens + 1) // 2)
    assert ((skip == 0) | (skip == skips[:, None])).all()


def test_pose_covers_relative_positions_as_published() -> None:
    published = json.loads((GOLDEN / "sampling_pose.json").read_text())[
        "relative_position_coverage_prob_window16_target128"
    ]
    positions = ask("pose", 16, factor=8).positions
    distances = (positions[:, :, None] - positions[:, None, :]).clamp(min=0).flatten(1)
    covered = torch.zeros(len(MANY), 128).scatter_(1, distances, 1.0).mean(dim=0)
    # The published numbers come from samples, too: both err by about 0.003.
    assert (covered - torch.tensor(published)).abs().max() < 0.01


@pytest.mark.parametrize("case", json.loads((GOLDEN / "sampling_pose.json").read_text())["pose"])
def test_pose_takes_the_released_codes_tokens(case: dict[str, Any]) -> None:
    """Given the released code's draws, its tokens and positions."""
    released = random.Random(case["seed"])
    size = min(case["tokens_available"], case["window"])
    first = released.randint(1, (size + 1) // 2)
    end = released.randint(size, case["tokens_available"])
    skip = released.randint(0, case["scaled_max"] - size)
    index, positions = skipped(size, first, end, skip)
    assert index.tolist() == case["token_index"]
    assert positions.tolist() == case["position_ids"]


def documents(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(3, 3 + length))} for length in lengths]


def test_collator() -> None:
    collator = PoSECollator(window=16, target_length=128, pad_token_id=1, generator=torch.Generator().manual_seed(0))
    batch = collator(documents(*([40] * 500), 10, 300))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (502, 16))
    tokens, positions = batch["input_ids"][:500] - 3, batch["position_ids"][:500]
    skip, dropped = positions[:, -1] - 15, tokens[:, -1] - 15
    assert 0 <= skip.min() < 4
    assert 108 < skip.max() <= 112
    assert (dropped.min(), dropped.max()) == (0, 24)
    first = (positions == torch.arange(16)).sum(dim=-1)
    assert set(first[skip > 0].tolist()) == set(range(1, 9))
    place = torch.arange(16)
    moved = skip > 0  # else the split cannot be told from the positions
    want = place + dropped[:, None] * (place >= first[:, None])
    assert torch.equal(tokens[moved], want[moved])
    short = {name: tensor[500].tolist() for name, tensor in batch.items()}
    assert short["input_ids"] == [*range(3, 13), *[1] * 6]
    assert short["labels"] == [*range(3, 13), *[-100] * 6]
    assert short["attention_mask"] == [1] * 10 + [0] * 6
    assert batch["input_ids"][501].max() < 3 + 128, "documents are cut at the target"


def test_collator_takes_labels_along() -> None:
    features = [{"input_ids": list(range(40)), "labels": [-token for token in range(40)]}]
    batch = PoSECollator(window=16, target_length=64)(features)
    assert torch.equal(batch["labels"], -batch["input_ids"])


def test_collators_draws() -> None:
    def positions(seed: int, *lengths: int) -> list[list[int]]:
        collator = PoSECollator(window=16, target_length=4096, generator=torch.Generator().manual_seed(seed))
        return collator(documents(*lengths))["position_ids"].tolist()

    assert positions(0, 40, 50) == positions(0, 40, 50)
    assert positions(0, 40) != positions(1, 40)
    assert positions(0, 40) != positions(0, 41), "ranks with one seed and other documents differ"


def test_a_collated_second_chunk_sees_the_first() -> None:
    """transformers takes a skip in positions for a new document, unless there is a mask."""
    model = tiny_model("llama")
    batch = PoSECollator(window=16, target_length=200, generator=torch.Generator().manual_seed(5))(documents(60))
    assert batch["position_ids"][0, -1] > 15
    with ropex.patch(model, "linear", factor=4), torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        want = model(**inputs).logits[:, -1]
        inputs["input_ids"][0, 0] += 1
        assert (model(**inputs).logits[:, -1] - want).abs().max() > 1e-6


SMALL = {"window": 4, "target_length": 8}


@pytest.mark.parametrize(
    ("options", "features", "message"),
    [
        ({"window": 0, "target_length": 8}, None, r"window=0: must be an int >= 1; pass the tokens of a training"),
        ({"window": 16, "target_length": 8}, None, r"target_length=8: must be an int >= 16; pass the length to train"),
        ({**SMALL, "pad_token_id": None}, None, r"pad_token_id=None: must be an int >= 0; pass the tokenizer's"),
        ({**SMALL, "generator": 5}, None, r"generator=5: must be a torch\.Generator, or None"),
        (SMALL, [], r"features of no sample: must be at least one"),
        (SMALL, ["text"], r"a feature of str: must have input_ids"),
        (SMALL, [{"labels": [1]}], r"a feature of labels: must have input_ids"),
        (
            SMALL,
            [{"input_ids": [1, 2], "position_ids": [0, 0]}],
            r"input_ids, position_ids: .* but no position",
        ),
        (SMALL, [{"input_ids": []}], r"input_ids float32 \[0\].*: must be one document's integer tokens, at least one"),
        (SMALL, [{"input_ids": [0.5, 1.0]}], r"input_ids float32 \[2\].*: must be one document's integer tokens"),
        (SMALL, [{"input_ids": [[1]]}], r"input_ids int64 \[1, 1\].*: must be one document's .*split batches"),
        (
            SMALL,
            [{"input_ids": [1, 2], "labels": [1]}],
            r"\[2\], labels int64 \[1\], .* as many labels",
        ),
        (SMALL, [{"input_ids": [1, 2], "attention_mask": [0, 0]}], r"attention_mask \[2\] with 0 ones: must be"),
    ],
)
def test_collators_errors(options: Any, features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoSECollator(**options)(features)


def test_a_collator_drops_padding() -> None:
    feature = {"input_ids": [5, 6, 7, 8, 0, 0, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0, 0, 0]}
    batch = PoSECollator(window=6, target_length=64)([feature])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker:UserWarning")  # on one core
def test_workers_and_epochs_draw_anew_from_a_given_generator() -> None:
    collator = PoSECollator(16, 4096, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(documents(*[400] * 4), batch_size=2, collate_fn=collator, num_workers=2)
    epochs = [[row[-1] for batch in loader for row in batch["position_ids"].tolist()] for _ in range(2)]
    assert len({*epochs[0], *epochs[1]}) == 8


# --- random positions -------------------------------------------------------------------------------------------------


def test_random_positions_are_subsets_of_the_target() -> None:
    positions, inv_freq, _ = ask("random_positions", 5, MANY[:20_000], factor=2)
    assert torch.equal(inv_freq, GEOMETRY.inv_freq() / 2)
    assert (positions.diff() > 0).all()
    assert (positions.min(), positions.max()) == (0, 31)
    # Each position is in a subset with probability 5 / 32; the counts of a sample add up, so their spread is smaller.
    counts = positions.flatten().bincount().double()
    assert chi_square(counts, 20_000 * 5 / 32) < 4.5


def test_random_steps_stay_below_the_target_and_grow_by_one_on_average() -> None:
    positions, inv_freq, _ = ask("random_positions", 16, factor=8, variant="steps")
    assert torch.equal(inv_freq, GEOMETRY.inv_freq() / 8 / 2**16)
    tokens = positions.double() / 2**16
    assert tokens.min() >= 0
    assert tokens.max() <= 128
    assert tokens[:, -1].mean().item() == pytest.approx(16, abs=0.1)
    steps = tokens.diff()
    assert steps.min() >= 0
    assert steps.max() <= 2
    assert steps.mean().item() == pytest.approx(1, abs=0.01)
    capped = ask("random_positions", 16, factor=1, variant="steps").positions.double() / 2**16
    assert capped.max() <= 16
    assert (capped[:, -1] > 15.99).float().mean() > 0.3, "scaled down to the target, not cut"


@pytest.mark.parametrize("method", ["random_positions", "clex"])
def test_padded_and_packed_rows_keep_their_order(method: str) -> None:
    """A position is looked up in the row's sample: equal ones stay equal, and the order stays."""
    options = {"factor": 4} if method == "random_positions" else {"max_factor": 4}
    rows = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])
    moved = ropex.schedule(method, **options).rotation(training_request(GEOMETRY, 8, positions=rows)).positions
    for got, row in zip(moved.tolist(), rows.tolist(), strict=True):
        table = dict(zip(row, got, strict=True))
        assert [table[position] for position in row] == got
        assert sorted(table.values()) == [table[position] for position in sorted(table)]
    far = ropex.schedule(method, **options).rotation(training_request(GEOMETRY, 8, positions=rows + 100)).positions
    assert (far.diff()[2] == 1).all(), "beyond the window they go on one by one"


def test_an_inner_schedule_draws_for_itself_and_sees_the_moved_length() -> None:
    nested = ask("pose", 16, inner="e2llm", g_max=20)
    alone = ask("e2llm", 16, g_max=20)
    assert not torch.equal(nested.inv_freq, alone.inv_freq)
    uniform_on((GEOMETRY.inv_freq() / nested.inv_freq)[:, 0, 0].round().to(torch.int64), 1, 20)
    dynamic = ask("pose", 16, MANY[:50], inner="dynamic_yarn", floor=128)
    assert dynamic.inv_freq.shape == (50, 1, 4)
    moving = ask("pose", 16, MANY[:50], inner=ropex.schedule("dynamic_yarn"), factor=8)
    lengths = moving.positions[:, -1] + 1
    for row, length in enumerate(lengths.tolist()):
        want = ropex.schedule("dynamic_yarn").at(GEOMETRY, length=length).inv_freq
        torch.testing.assert_close(moving.inv_freq[row, 0], want, rtol=1e-15, atol=0)


# --- keys: seed, step, sample -----------------------------------------------------------------------------------------

POSITIONS = torch.arange(16).expand(4, 16)


def test_a_module_draws_anew_at_every_step_and_again_from_its_state() -> None:
    rope = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("pose", factor=64))
    assert list(rope.state_dict()) == ["step"]
    drawn = [rope(POSITIONS).positions.tolist() for _ in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]
    assert rope.step.item() == 3
    want = [rope.eval()(POSITIONS).positions.tolist() for _ in range(2)]
    assert want[0] == want[1] == POSITIONS.tolist()
    assert rope.step.item() == 3, "evaluation is no step"
    rope.train()
    resumed = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("pose", factor=64))
    resumed.load_state_dict(rope.state_dict())
    copied = copy.deepcopy(rope)
    following = rope(POSITIONS).positions
    assert torch.equal(resumed(POSITIONS).positions, following)
    assert torch.equal(copied(POSITIONS).positions, following)
    other = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("pose", factor=64), seed=1)
    assert other(POSITIONS).positions.tolist() != drawn[0]
    moved = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("pose", factor=64)).to("meta").to_empty(device="cpu")
    assert moved(POSITIONS).positions.tolist() == drawn[0]


def test_ranks_draw_as_one_process_with_all_samples_would() -> None:
    def drawn(rank: int | None, rows: int) -> Tensor:
        rope = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("e2llm"), data_rank=rank)
        return rope(torch.arange(16).expand(rows, 16)).positions

    assert torch.equal(torch.cat((drawn(0, 2), drawn(1, 2))), drawn(None, 4))


def test_the_rank_is_that_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    implied = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("e2llm"))(POSITIONS)
    explicit = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("e2llm"), data_rank=3)(POSITIONS)
    shared = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("e2llm"), data_rank=0)(POSITIONS)
    assert torch.equal(implied.positions, explicit.positions)
    assert not torch.equal(implied.positions, shared.positions)


def test_a_compiled_module_draws_the_same_and_steps() -> None:
    torch.compiler.reset()
    eager = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("e2llm"))
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        got, want = compiled(POSITIONS), eager(POSITIONS)
        assert torch.equal(got.positions, want.positions)
        assert torch.equal(got.inv_freq, want.inv_freq)


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 0.5}, {"data_rank": -1}, {"data_rank": 1.0}])
def test_bad_seeds_and_ranks(options: Any) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}={options[name]}: must be an int >= 0; pass the "):
        ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("e2llm"), **options)


def test_the_state_of_a_model_that_never_drew_loads() -> None:
    plain = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("linear", factor=2))
    drawing = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("pose", factor=2))
    drawing(POSITIONS)
    drawing.load_state_dict(plain.state_dict())
    assert drawing.step.item() == 1
    plain.load_state_dict(drawing.state_dict())


def test_weights_have_one_name_inside_a_wrapper_or_not() -> None:
    wrapped = ropex.RotaryEmbedding(GEOMETRY, ropex.schedule("pose", inner=CLEX(max_factor=4)))
    bare = ropex.RotaryEmbedding(GEOMETRY, CLEX(max_factor=4))
    bare.load_state_dict(wrapped.state_dict())
    assert torch.equal(bare.learned.up_proj, wrapped.learned.up_proj)
    assert bare.schedule is bare.learned


def test_a_learned_schedule_inside_a_wrapper_is_trained_by_its_module() -> None:
    wrapped = ropex.schedule("resonance", inner=CLEX(max_factor=4))
    rope = ropex.RotaryEmbedding(GEOMETRY, wrapped)
    assert sorted(rope.state_dict()) == ["learned.down_proj", "learned.up_proj", "step"]
    assert rope.schedule.inner is rope.learned
    twin = copy.deepcopy(rope)
    assert twin.schedule.inner is twin.learned is not rope.learned
    rotation = rope(POSITIONS + torch.tensor([[0], [1], [2], [3]]))
    ropex.rotate(torch.randn(4, 1, 16, 8), rotation=rotation).square()[..., :3].sum().backward()
    assert rope.get_parameter("learned.down_proj").grad is not None
    assert all(parameter.dtype == torch.float64 for parameter in rope.double().schedule.inner.parameters())


# --- patched models ---------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("method", ["e2llm", "pose", "random_positions", "clex"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_patched_model_draws_in_training_alone(method: str, family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(40, batch=3)
    factor = {} if method in ("e2llm", "clex") else {"factor": 4}
    before = logits(model, ids)
    with ropex.patch(model, method, seed=3, **factor) as patch:
        assert model.config.max_position_embeddings == patch.schedule.target_length(TRAINED_LENGTH)
        evaluated = logits(model, ids)
        assert torch.equal(logits(model, ids), evaluated)
        model.train()
        losses = [loss_of(model, ids) for _ in range(6)]
        assert len({loss.item() for loss in losses}) > 1
        losses[-1].backward()
        assert torch.equal(logits(model.eval(), ids), evaluated)
        # The rows of a batch differ, though transformers gives them one row of positions.
        rope = next(module for module in model.modules() if isinstance(module, ropex.RotaryEmbedding)).train()
        expanded = rope(torch.arange(40).expand(3, 40)).positions
        assert method == "clex" or len({tuple(row) for row in expanded.tolist()}) == 3
    assert torch.equal(logits(model, ids), before)


def test_each_sample_of_a_batch_gets_its_own_draw() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(40).expand(3, 40)
    with ropex.patch(model, "pose", factor=8), torch.no_grad():
        rows = model.train()(input_ids=ids, use_cache=False).logits
    assert (rows[0] - rows[1]).abs().max() > 1e-6
    assert (rows[1] - rows[2]).abs().max() > 1e-6


@pytest.mark.parametrize("method", ["pose", "e2llm", "clex"])
def test_a_cache_is_refused_while_a_schedule_draws(method: str) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(20)
    options = {"max_factor": 2, "factor": 2.0} if method == "clex" else {"factor": 2}
    with ropex.patch(model, method, **options), torch.no_grad():
        model.train()
        with pytest.raises(ValueError, match=r"cache with tokens in training mode with .*; call model\.eval\(\)"):
            model.generate(ids, max_new_tokens=3, do_sample=False)
        model.eval().generate(ids, max_new_tokens=3, do_sample=False)


def test_clex_trains_inside_a_model_and_is_saved_with_it() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(48, batch=2)
    keys = list(model.state_dict())
    patch = ropex.patch(model, "clex", max_factor=4)
    added = set(model.state_dict()) - set(keys)
    assert added == {
        f"model.rotary_emb.ropes.scaled.{name}" for name in ("learned.up_proj", "learned.down_proj", "step")
    }
    weight = model.get_parameter("model.rotary_emb.ropes.scaled.learned.down_proj")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    assert weight.abs().max() > 0
    model.eval()
    long = tiny_tokens(TRAINED_LENGTH + 100)
    want = logits(model, long)
    other = tiny_model("llama", seed=1)
    ropex.patch(other, "clex", max_factor=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, long), want)
    patch.remove()
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("method", ["clex", "e2llm"])
def test_training_compiles_and_checkpoints(method: str) -> None:
    torch.compiler.reset()
    options = {"max_factor": 3} if method == "clex" else {}
    losses, gradients = [], []
    for kind in ("eager", "checkpointed", "compiled"):
        model, ids = tiny_model("llama").train(), tiny_tokens(40, batch=2)
        ropex.patch(model, method, **options)
        if method == "clex":
            net = model.get_submodule("model.rotary_emb.ropes.scaled.learned")
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.fill_(0.01)
        if kind == "checkpointed":
            # transformers 5 renamed it
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        ask = torch.compile(model, fullgraph=True, backend="aot_eager") if kind == "compiled" else model
        for _ in range(2):
            loss = ask(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert len(gradients[0]) == len(list(model.parameters()))
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
