"""What a training run tells: TensorBoard events beside the log."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from patchnetvlad.validation import Validation


class TrainingLog:
    """TensorBoard events of a run; a silent one (folder None) takes everything and writes nothing."""

    def __init__(self, folder: Path | None, after_step: int) -> None:
        """after_step: events of later steps, of a run that was killed after its last checkpoint, are dropped."""
        self._writer: SummaryWriter | None = None
        if folder is not None:
            self._writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)

    def step(self, step: int, loss: float, num_negatives: int) -> None:
        """One step's mean loss over its negatives, and how many those were."""
        self._add("Train/Loss", loss, step)
        self._add("Train/nNeg", num_negatives, step)

    def subset(self, step: int, pictures_a_second: float, found: int, queries: int) -> None:
        """After a subset: speed of mining and learning, and the share of queries that had a hard negative."""
        self._add("Train/PicturesPerSecond", pictures_a_second, step)
        self._add("Train/QueriesWithNegatives", found / queries, step)
        self.flush()

    def epoch(self, epoch: int, average_loss: float, learning_rate: float) -> None:
        self._add("Train/AvgLoss", average_loss, epoch)
        self._add("Train/LearningRate", learning_rate, epoch)
        self.flush()

    def validation(self, epoch: int, validation: Validation) -> None:
        """Recall@N of all cities together and of each."""
        for n, value in validation.total.items():
            self._add(f"Val/Recall@{n}", value, epoch)
        for city, recall in validation.cities.items():
            for n, value in zip(recall.n_values, recall.with_match, strict=True):
                self._add(f"Val_{city}/Recall@{n}", value, epoch)
        self.flush()

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)
