"""Weights & Biases as one more logger of a run directory."""

import secrets
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.atomic_file import atomic_file
from lightning_modules.loggers import RunLogger

ID_NAME = "wandb_id"


class RunWandbLogger(RunLogger, WandbLogger):  # type: ignore[misc]  # a version may be a number or a name
    """Scalars and hyper-parameters to Weights & Biases; files of its own in `wandb/` of the run directory.

    The id of the W&B run is kept in `wandb_id` there, so a resumed run goes on in it. Rows bear
    trainer/global_step, on which W&B's charts are drawn; rows of steps that a resume repeats stand there
    twice, because W&B takes none back. With ``WANDB_MODE=offline`` in the environment nothing leaves the
    machine.

    Args:
        project: of W&B.
        entity: user or team of W&B; null for the default one.
        directory: the run directory; null lets the command line choose it.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(
        self, project: str = "theria", entity: str | None = None, directory: str | None = None
    ) -> None:
        WandbLogger.__init__(self, project=project, entity=entity)
        if directory is not None:
            self.bind(Path(directory))

    def bind(self, directory: Path, resumed_step: int | None = None) -> None:
        """Write into `directory`, and into the W&B run that it has begun."""
        super().bind(directory, resumed_step)
        # in full, since W&B's own process may stand elsewhere
        self._wandb_init["dir"] = str(directory.resolve())
        self._wandb_init["name"] = f"{directory.parent.name}/{directory.name}"
        self._take_up_id(directory / ID_NAME)

    @rank_zero_only
    def _take_up_id(self, path: Path) -> None:
        if not path.exists():
            with atomic_file(path) as file:
                file.write(secrets.token_hex(4).encode())
        self._wandb_init["id"] = path.read_text()
