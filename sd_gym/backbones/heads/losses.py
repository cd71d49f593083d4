"""The losses that a backbone is prepared with: the task's, and the distillation of dense outputs."""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # an ignored label


class Losses:
    """Losses of one kind of output."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the labels that are not ``IGNORED``."""
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    def distillation(self, logits: Tensor, dense_logits: Tensor, labels: Tensor) -> Tensor:
        """Mean KL divergence from the dense output over these labels; the dense output gets no gradient."""
        counted = labels != IGNORED
        return divergence(logits[counted], dense_logits.detach()[counted])

    def counted(self, labels: Tensor) -> Tensor:
        """How many values ``loss`` and ``distillation`` are means over, int64 ``[2]``."""
        return (labels != IGNORED).sum().expand(2)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean KL divergence over rows of logits ``[rows, classes]``."""
    log_prob, target = F.log_softmax(logits, dim=-1), F.log_softmax(target, dim=-1)
    return F.kl_div(log_prob, target, reduction="batchmean", log_target=True)
