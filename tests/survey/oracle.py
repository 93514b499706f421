"""Ordinary autograd over the whole model, one example at a time, which every sweep must equal."""

import pytest
import torch
from small_models import collated, examples, language_loss, quadratic_form

from farss.maths.directions import direction_scores, select
from farss.methods import METHODS
from farss.structure import target_layers, weight_of
from farss.survey import Site, read_layers, survey
from farss.survey.against import against


def brute_force(model, rows, loss=language_loss):
    """A and G of every linear layer, one example at a time, from ordinary autograd over the whole model."""
    names, seen, tokens = list(target_layers(model)), {}, 0

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            seen[name] = (args[0].detach().flatten(0, -2), output)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model.requires_grad_(True)
    moments = {}
    for row in rows:
        loss(model, row).backward()
        tokens += len(row["input_ids"])
        for name, (h, y) in seen.items():
            a, g = moments.get(name, (0, 0))
            gradient = y.grad.flatten(0, -2)
            moments[name] = (a + h.T @ h, g + gradient.T @ gradient)
    for hook in hooks:
        hook.remove()
    return {name: (a / tokens, g / tokens) for name, (a, g) in moments.items()}


FLOAT32 = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h")
"""Models whose scan (Mamba 2) computes in float32, whatever they are in: it rounds the same example otherwise in another batch."""


def assert_equals(found, model, expected):
    """Importance, statistics and chosen directions are those of full covariances and LAPACK's decomposition."""
    near = 1e-6 if model.config.model_type in FLOAT32 else 1e-9
    assert set(found.layers) == set(expected)
    for name, (a, g) in expected.items():
        weight = weight_of(model.get_submodule(name)).detach()
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        v, known = vh.T, found.directions(name)
        assert found.layers[name].importance == pytest.approx((quadratic_form(weight, a, g) / weight.numel()).item(), rel=near)
        scores = direction_scores(sigma, ((v.T @ a) * v.T).sum(1), ((u.T @ g) * u.T).sum(1))
        for side in ("least", "most"):
            chosen = select(scores, 4, side)
            assert select(known.scores, 4, side).tolist() == chosen.tolist()
            kept_u, kept_v = found.vectors(name, chosen.tolist())
            start = (kept_u * known.sigma[chosen]) @ kept_v.T
            torch.testing.assert_close(start.double(), (u[:, chosen] * sigma[chosen]) @ v[:, chosen].T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(known.sigma, sigma.float())
        torch.testing.assert_close(known.lam, ((v.T @ a) * v.T).sum(1).float(), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(known.gam, ((u.T @ g) * u.T).sum(1).float(), rtol=1e-5, atol=1e-12)


def survey_of(model, folder):
    return survey(Site(model, folder, 4), collated(examples()))


def read_activations(model, folder):
    return read_layers(Site(model, folder, 4), METHODS["corda-kpm"].needs.read, collated(examples()))


def read_against(model, folder):
    return against(Site(model, folder, 4), collated(examples()), collated(examples(seed=1)), METHODS["farss-plus"].needs.read)
