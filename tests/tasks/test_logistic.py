"""Logistic regression of two classes: losses and penalties in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from fedbilevel.tasks import logistic


def test_losses_are_those_of_both_logits_and_do_not_overflow():
    y = {"weight": jnp.array([2.0, -1.0]), "bias": jnp.array(0.5)}
    a = np.array([[1.0, 0.0], [0.0, 4.0], [500.0, 0.0]])
    one = a @ [2, -1] + 0.5
    np.testing.assert_allclose(logistic.logits(y, jnp.asarray(a)), np.stack([0 * one, one], 1))
    for row, logit in zip(a, one, strict=True):
        assert float(logistic.logit(y, jnp.asarray(row))) == logit
        for label, sign in ((1, -1), (0, 1)):
            loss = logistic.cross_entropy(jnp.asarray(logit), jnp.asarray(label))
            np.testing.assert_allclose(loss, np.logaddexp(0, sign * logit), rtol=1e-12)


def test_each_group_has_its_penalty():
    y = {"weight": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array(4.0)}
    value = logistic.penalty(jnp.log(jnp.array([0.5, 7.0])), y, (2, 1))
    np.testing.assert_allclose(value, 0.5 * (0.5 * 5 + 7 * 9 + logistic.BIAS_PENALTY * 16), rtol=1e-12)
