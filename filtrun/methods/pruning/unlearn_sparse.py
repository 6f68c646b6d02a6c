"""Unlearning with sparsity: prune first, then unlearn, or unlearn under a decaying L1 penalty.

Jia, Liu, Ram, Yao, Liu, Liu, Sharma and Liu, "Model Sparsity Can Simplify Machine Unlearning" (NeurIPS 2023, arXiv
2304.04934; official code OPTML-Group/Unlearn-Sparse). A classifier trained on everything is to forget a class, or some
images, as if it had never seen them; the measure is a network retrained without them, and a sparse network comes
closer to that by cheap means. Five numbers say how close: unlearning accuracy UA (1 - accuracy on what is forgotten),
RA and TA (accuracy on retained and on test images), and how far a membership attack takes forgotten images for unseen
ones and tells retained from test ones (see `mia`).

Kept as the official code has them: the L1 norm covers every parameter, also norms and biases; a retrained network
starts from random weights inside the mask that was found on all data. Its one weight `alpha` for penalty, Fisher noise
and influence step is three options here, as the scales have nothing in common. The official default of 0.2 suits none
of them: times the absolute sum of eleven million weights it drives a network to zero, so the penalty's default is in
the range from 1e-5 to 5e-4, where it stays a part of the loss. The penalty is a sum, and how far it
moves a weight grows with steps and learning rate: a net with a hundredth of the parameters and a tenth of the steps
needs more of it (1e-2 for 68 thousand parameters and ten epochs of digits).

Alone, on any model, in two lines:

>>> method = UnlearnSparse(alpha=1e-4)  # doctest: +SKIP
>>> loss = F.cross_entropy(model(x_retained), y) + method.penalty(model, epoch, epochs)  # doctest: +SKIP
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from filtrun.callbacks import Ema
from filtrun.context import seed_generators
from filtrun.data.split import permutation
from filtrun.errors import Unfit, UserError
from filtrun.methods.pruning import tickets, unlearners
from filtrun.methods.pruning import unlearn_networks as networks
from filtrun.methods.pruning.base import Pruning
from filtrun.methods.pruning.unlearn_metrics import gaps, measures
from filtrun.methods.pruning.unlearn_steps import add_influence, add_noise
from filtrun.options import opt
from filtrun.plan import pretrainer
from filtrun.trainer import Phase

if TYPE_CHECKING:
    from filtrun.context import Run
    from filtrun.data.base import Split

TRAINED = ("retrain", "ft", "ga", "l1_sparse")


@dataclass
class UnlearnSparse(Pruning):
    """Make a classifier forget `data.target` (or random images), dense or inside the mask of a pruned network.

    The run's steps and learning rate are those of unlearning; ``retrain`` takes the number of steps, learning rate and
    schedule of the base's training. ``fisher`` and ``wfisher`` take no steps.
    """

    unlearner: str = opt("l1_sparse", "retrain: anew without the forgotten; ft: fine-tune on the rest; ga: gradient "
                         "ascent on the forgotten; fisher: noise; wfisher: influence; l1_sparse: ft with an L1 penalty",
                         choices=("retrain", "ft", "ga", "fisher", "wfisher", "l1_sparse"), source="paper")  # fmt: skip
    forget: str = opt("class", "what goes: the classes data.target, or random images (with classes=all)",
                      choices=("class", "random"), source="paper")  # fmt: skip
    forget_count: int | None = opt(None, "random images to forget; null: a tenth", low=1, source="README: 4500")
    alpha: float = opt(1e-4, "weight of the L1 penalty at the start (l1_sparse)", low=0, source="paper's range")
    free_epochs: int = opt(0, "last epochs without the penalty (l1_sparse)", low=0, source="arg_parser.py no-l1-epochs")
    fisher_alpha: float = opt(1e-6, "amount of noise (fisher); the paper's is not published", low=0)
    wfisher_alpha: float = opt(1.0, "length of the influence step (wfisher); the paper's is not published", low=0)
    inverse: str = opt("recursion", "inverse Fisher matrix of wfisher: the official recursion, or exact (woodbury)",
                       choices=("recursion", "woodbury"), source="unlearn/Wfisher.py")  # fmt: skip
    samples: int = opt(1000, "single retained images the Fisher matrix of wfisher is made of", low=1,
                       source="unlearn/Wfisher.py")  # fmt: skip
    prune: str = opt("none", "how the network is pruned before", choices=("none", "omp", "imp", "synflow"),
                     source="paper")  # fmt: skip
    rate: float = opt(0.95, "share of all convolution weights that goes", low=0, high=0.9999, source="arg_parser.py")
    imp_step: float = opt(0.2, "share of the living weights pruned in a round of imp", low=0.001, high=0.999,
                          source="README")  # fmt: skip
    rewind: float = opt(0.044, "share of the base's training after which weights and learning rate are rewound to",
                        low=0, high=1, source="README: epoch 8 of 182")  # fmt: skip
    reference: bool = opt(False, "also retrain without the forgotten (a cached stage), and report the gaps to that")
    attack: str = opt("confidence", "what the membership attack sees", source="SVC_MIA.py",
                      choices=("confidence", "correctness", "entropy", "m_entropy", "prob"))  # fmt: skip
    official_m_entropy: bool = opt(False, "the attack's m_entropy as in the official code", source="SVC_MIA.py")

    paper: ClassVar[str] = "Model Sparsity Can Simplify Machine Unlearning (NeurIPS 2023, arXiv 2304.04934)"
    tasks: ClassVar[tuple[str, ...] | None] = ("classify",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forgotten: Split | None = None
        self.retained: Split | None = None
        self.seconds = 0.0
        self._since: float | None = None
        self._measured_at = -1

    # -- the method on a bare model ----------------------------------------------------------------------------------
    def penalty(self, model: nn.Module, epoch: int, epochs: int) -> Tensor:
        """The L1 term of `epoch` (from 0) of `epochs`, a scalar to add to the loss on retained images."""
        weight = unlearners.l1_weight(self.alpha, epoch, epochs, self.free_epochs)
        return weight * unlearners.l1_norm(model.parameters())

    # -- hooks: before training --------------------------------------------------------------------------------------
    def prepare(self, run: Run) -> None:
        super().prepare(run)
        self._check(run)
        train = run.data.split("train", "all")
        gone = self._gone(run, train)
        self.forgotten = train.subset(gone.nonzero().flatten(), "train/forget")
        self.retained = train.subset((~gone).nonzero().flatten(), "train/retain")
        run.train_split = self.forgotten if self.unlearner == "ga" else self.retained
        if self.prune != "none":
            convs = tickets.conv_weights(run.model)
            if not convs:
                raise Unfit(f"method.{self.slug}.prune={self.prune} prunes Conv2d layers, and this model has none")
            run.claim(self, convs.values(), "entries")

    def _check(self, run: Run) -> None:
        me, wanted = f"method.{self.slug}", "source" if self.forget == "class" else "all"
        if run.which != wanted:
            raise UserError(
                f"classes={run.which} does not go with {me}.forget={self.forget}; set classes={wanted}"
                + (" and data.target to the classes to forget" if wanted == "source" else "")
            )
        base = run.config["model"].get("base", "pretrain")
        if base == "pretrain" and run.config["pretrain"].get("classes", "source") != "all":
            raise UserError("pretrain.classes=source leaves nothing to forget; set pretrain.classes=all")
        if base != "pretrain" and self.prune != "none":
            raise UserError(
                f"{me}.prune={self.prune} trains the pruned network as the base was, so it needs model.base=pretrain, "
                f"not {base}; or set {me}.prune=none"
            )

    def _gone(self, run: Run, train: Split) -> Tensor:
        """Which training images are forgotten: bool (N,)."""
        gone = torch.zeros(len(train), dtype=torch.bool)
        if self.forget == "random":
            count = max(1, len(train) // 10) if self.forget_count is None else self.forget_count
            if count >= len(train):
                raise UserError(
                    f"method.{self.slug}.forget_count={count} must leave some of the {len(train)} training images"
                )
            gone[permutation(len(train), "forget", run.seed)[:count]] = True
        else:
            run.data.split("train", "target")  # says so when there is none
            gone = torch.isin(train.labels.cpu(), torch.tensor(run.data.target))
        return gone

    def phases(self, run: Run) -> list[Phase] | None:
        if self.unlearner == "retrain":
            base, part = pretrainer(run.config), run.train_split
            steps = base.total_steps(len(part) if part is not None else 0)
            return [Phase("retrain", steps, base.lr, base.schedule, base.warmup)]
        return None if self.unlearner in TRAINED else [Phase(self.unlearner, 0)]

    # -- hooks: in the loop ------------------------------------------------------------------------------------------
    def start_phase(self, run: Run) -> None:
        if self.prune != "none":
            state, keep = self.pruned(run)
            run.model.load_state_dict(state)
            for name, mask in keep.items():
                self.masks.set(name, self.weights[name], mask)
        if self.unlearner == "retrain":
            seed_generators(run.seed, run.device)
            run.model.load_state_dict(networks.fresh(run).state_dict())
        self.masks.apply()
        self._since = time.perf_counter()
        if self.unlearner not in TRAINED:
            with run.plainly():
                self._perturb(run)
                self.masks.apply()
            self.seconds = time.perf_counter() - self._since
        for callback in run.callbacks:
            if isinstance(callback, Ema):  # averages start from the weights that are now there
                callback.average = []
                callback.start(run)

    def loss(self, run: Run, batch: Any, loss: Tensor) -> Tensor:
        if self.unlearner == "ga":
            return -loss
        if self.unlearner == "l1_sparse":
            epochs = -(-sum(phase.steps for phase in run.phases) // run.steps_per_epoch)
            if weight := unlearners.l1_weight(self.alpha, run.epoch, epochs, self.free_epochs):
                return loss + weight * unlearners.l1_norm(run.model.parameters())
        return loss

    def after_backward(self, run: Run) -> None:
        self.masks.apply_to_gradients()

    def after_step(self, run: Run) -> None:
        super().after_step(run)
        now = time.perf_counter()
        self.seconds += now - self._since if self._since is not None else 0.0
        self._since = now

    def _perturb(self, run: Run) -> None:
        assert self.retained is not None and self.forgotten is not None
        dead = {id(mask.parameter): ~mask.keep for mask in self.masks}
        if self.unlearner == "fisher":
            classes = list(run.data.target) if self.forget == "class" else []
            add_noise(run, self.retained, self.fisher_alpha, classes, dead)
        else:
            exact = self.inverse == "woodbury"
            add_influence(run, self.forgotten, self.retained, self.wfisher_alpha, self.samples, exact, dead)

    # -- the pruned network and the retrained one: cached stages -------------------------------------------------------
    def pruned(self, run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The pruned network trained on all images: its state, and the masks by name of weight."""
        return networks.pruned(run, self.slug, self.prune, self.rate, self.imp_step, self.rewind)

    def retrained(self, run: Run) -> nn.Module:
        """The reference: retrained from random weights on the retained images, inside the run's masks."""
        keep = {mask.name: mask.keep for mask in self.masks}
        return networks.trained(run, self.slug, "unlearn-retrain", run.seed, keep, part=self.retained)

    # -- what it is worth --------------------------------------------------------------------------------------------
    def judge_model(self, run: Run, model: nn.Module) -> dict[str, float]:
        """UA, RA, TA and both attacks, each in [0, 1], of a model in evaluation mode."""
        assert self.retained is not None and self.forgotten is not None
        test = run.data.split("test", "all")
        if self.forget == "class":  # a forgotten class is no longer asked for
            stays = ~torch.isin(test.labels.cpu(), torch.tensor(run.data.target))
            test = test.subset(stays.nonzero().flatten(), "test/retain")
        parts = (self.forgotten, self.retained, test)
        return measures(run, model, *parts, attack=self.attack, official=self.official_m_entropy)

    def report(self, run: Run) -> dict[str, float | int | str]:
        if run.trainer.evaluate and self._measured_at != run.step:
            self._measured_at = run.step
            with run.evaluating():
                mine = self.judge_model(run, run.model)
            self.measured = {f"unlearn/{name}": value for name, value in mine.items()}
            if self.reference:
                other = mine
                if self.unlearner != "retrain":
                    other = self.judge_model(run, self.retrained(run).eval())
                self.measured |= gaps(mine, other)
        self.measured["unlearn/minutes"] = self.seconds / 60
        out = super().report(run)
        assert self.forgotten is not None and self.retained is not None
        out |= {"forget_images": len(self.forgotten), "retain_images": len(self.retained)}
        if len(self.masks):
            out |= {"sparsity": self.masks.sparsity(), "least_layer_density": min(self.masks.shares().values())}
        return out

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seconds = float(state.get("seconds", 0.0))
