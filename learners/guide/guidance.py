"""What guided sampling follows uphill: one log-likelihood per image, of classes that the images are not yet sure of.

Cywinski et al., "GUIDE: Guidance-based Incremental Learning with Diffusion Models", 2024, arXiv:2403.03938, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from learners.guide.learner import GUIDE


def log_likelihood(flags: GUIDE.Config, logits: Tensor, labels: Tensor, num_old: int, num_seen: int) -> Tensor:
    """Return what the variant that the flags pick follows uphill, (B,), unscaled.

    Args:
        flags: ``use_old_grad``, ``negate_old_grad``, ``guid_to_new_classes`` and ``trim_logits`` are read.
        logits: float (B, num_classes) of clean predictions, from the classifier before this task with
            ``use_old_grad``, else from the present one.
        labels: int64 (B,), old classes that the images are drawn for.
        num_old, num_seen: classes before and after this task.

    """
    if flags.use_old_grad:
        toward = toward_label(logits[:, :num_old] if flags.trim_logits else logits, labels)
        return -toward if flags.negate_old_grad else toward
    logits_seen = logits[:, :num_seen] if flags.trim_logits else logits
    if flags.guid_to_new_classes:
        return toward_best_new(logits_seen, range(num_old, num_seen))
    return -toward_label(logits_seen, labels)


def toward_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p of one class per image, (B,), among the classes of ``logits``, (B, K)."""
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def toward_best_new(logits: Tensor, new: range) -> Tensor:
    """Return log p of each image's likeliest new class, (B,), picked anew at every call.

    Args:
        logits: (B, K), of old classes and new ones.
        new: columns of the new ones; every task brings some.
    """
    return toward_label(logits, logits[:, new.start : new.stop].argmax(1) + new.start)
