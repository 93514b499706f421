"""Laws of TRSP's scalars and of its penalty."""

import pytest
import torch
from small_models import collated, examples, logits, small
from trainings import examples as rows_to_learn
from trainings import options, tokenizer, whole_model

from farss.pruning.choose import changes, greedy, influences, smallest
from farss.pruning.regularised import SCALAR, Changes, Scalars
from farss.pruning.surgery import delete_blocks
from farss.structure import find_blocks
from farss.tasks.likelihood import token_loglikelihoods
from farss.train import train


def silent(*_):
    pass


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "gpt2", "gpt-neox"])
@pytest.mark.parametrize(("gate", "tolerance"), [("output", 0.0), ("branch", 1e-5)])
def test_scalars_of_one_change_nothing(kind, gate, tolerance):
    model = small(kind).float()
    before = logits(model)
    with (scalars := Scalars(model, gate, 1.0)).applied():
        assert (logits(model) - before).abs().max() <= tolerance * before.abs().max()
    scalars.remove()
    assert torch.equal(logits(model), before)
    assert not any(SCALAR in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_branch_with_scalar_nought_is_a_deleted_block(kind):
    model = small(kind)
    scalars = Scalars(model, "branch", 1.0)
    scalars.values[1].data.zero_()
    with scalars.applied():
        found = logits(model)
    scalars.remove()
    delete_blocks(model, [1])
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def test_the_penalty_of_the_scalars_is_their_weighted_sum():
    scalars = Scalars(small("llama"), "output", 0.5)
    for place, value in enumerate(scalars.values):
        value.data.fill_((-1) ** place * place)
    assert float(scalars.penalty()) == pytest.approx(0.5 * (0 + 1 + 2 + 3))


def test_training_moves_the_scalars_alone_and_a_useless_block_the_most(tmp_path):
    model = whole_model().requires_grad_(False)
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        linear.weight.data.zero_()  # what leaves it is what enters it, and the loss does not see its scalar but through the norm
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scalars = Scalars(model, "branch", 0.05)
    config = options(max_steps=8, learning_rate=1e-2, scheduler="constant", warmup_ratio=0.0, dropout=0.0)
    with scalars.applied():
        train(model, tokenizer(), rows_to_learn(), config, tmp_path, regime=scalars)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters() if SCALAR not in name)
    values = [value.item() for value in scalars.values]
    assert values[1] == pytest.approx(1 - 8 * 1e-2, abs=1e-4)  # Adam's steps down the penalty, and nothing against them
    assert values[0] != 1


@pytest.mark.parametrize(("norm", "order"), [("frobenius", 2), ("l1", 1)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_penalty_is_the_norm_of_what_the_blocks_add(kind, norm, order):
    model, (batch, *_) = small(kind).float(), collated(examples())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    blocks, seen = find_blocks(model)[1], {}
    for index in (1, 3):
        blocks[index].register_forward_hook(
            lambda block, args, kwargs, output, index=index: seen.update(
                {index: (args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)}
            ),
            with_kwargs=True,
        )
    penalty = Changes(model, [1, 3], 0.25, norm)
    with penalty.applied():
        model(**inputs)
    expected = sum(
        torch.stack([(after[row] - before[row]).flatten().norm(p=order) for row in range(len(after))]).mean()
        for before, after in seen.values()
    )
    torch.testing.assert_close(penalty.penalty(), 0.25 * expected, rtol=1e-5, atol=0)
    assert Changes(model, [1], 0.0, norm).penalty() is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_chosen_blocks_change_less_and_less_and_micro_batches_do_not_matter(checkpointing, tmp_path):
    rows, found = rows_to_learn(8).rows, {}
    rows = [{name: values[:8] for name, values in row.items()} for row in rows if len(row["input_ids"]) >= 8]
    for weight, micro in ((0.0, 4), (0.3, 4), (0.3, 1)):
        model = whole_model().requires_grad_(True)
        penalty = Changes(model, [1], weight, "frobenius")
        before = changes(model, rows, [1], 4, 0)[1]
        config = options(max_steps=6, learning_rate=1e-3, micro_batch_size=micro, gradient_checkpointing=checkpointing, warmup_ratio=0.0)
        with penalty.applied():
            train(model, tokenizer(), rows_to_learn(8), config, tmp_path / f"{weight}-{micro}", regime=penalty)
        found[weight, micro] = changes(model, rows, [1], 4, 0)[1], before
    assert found[0.3, 4][0] < 0.9 * before
    assert found[0.3, 4][0] < found[0.0, 4][0]
    assert found[0.3, 1][0] == pytest.approx(found[0.3, 4][0], rel=1e-3)


# --- rules that train nothing -----------------------------------------------------------------------------------------


def test_influence_is_one_minus_the_cosine(tmp_path):
    model, rows = small("llama").float(), examples()
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        linear.weight.data.zero_()
    found = influences(model, rows, 2, 0, silent)
    assert found[2] == pytest.approx(0, abs=1e-6)
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda block, args, output: seen.append((args[0], output)))
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    cosines = torch.cat([torch.nn.functional.cosine_similarity(before[0], after[0], dim=-1) for before, after in seen])
    assert found[1] == pytest.approx(1 - float(cosines.mean()), rel=1e-4)
    assert influences(model, rows, 6, 0, silent) == pytest.approx(found, rel=1e-5)


def test_greedy_takes_the_cheapest_block_each_time(tmp_path):
    model, rows = small("llama").float(), examples()
    gone = [each["block"] for each in greedy(model, rows, [0, 1, 2, 3], 2, 3, 0, tmp_path / "rounds.json", silent)]

    def loss(without):
        shorter = small("llama").float()
        delete_blocks(shorter, without)
        return -sum(token_loglikelihoods(shorter, rows, 3, 0)) / len(rows)

    first = {index: loss([index]) for index in range(4)}
    assert gone[0] == min(first, key=first.get)
    second = {index: loss([gone[0], index]) for index in range(4) if index != gone[0]}
    assert gone[1] == min(second, key=second.get)


def test_a_killed_greedy_choice_measures_nothing_again(tmp_path, monkeypatch):
    model, rows, path = small("llama").float(), examples(), tmp_path / "rounds.json"

    class Killed(Exception):
        pass

    def kill(done, total, line):
        assert total == 7
        if done == 5:  # the first block of the second round
            raise Killed

    with pytest.raises(Killed):
        greedy(model, rows, [0, 1, 2, 3], 2, 3, 0, path, kill)
    measured = []

    def counted(*args):
        measured.append(1)
        return token_loglikelihoods(*args)

    monkeypatch.setattr("farss.pruning.choose.token_loglikelihoods", counted)
    rounds = greedy(model, rows, [0, 1, 2, 3], 2, 3, 0, path, silent)
    assert len(measured) == 2
    assert rounds == greedy(model, rows, [0, 1, 2, 3], 2, 3, 0, tmp_path / "anew.json", silent)


def test_of_equal_values_the_first_is_taken():
    assert smallest({3: 1.0, 1: 0.5, 2: 0.5, 0: 2.0}, 3) == [1, 2, 3]
