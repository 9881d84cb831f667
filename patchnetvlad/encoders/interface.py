"""What every encoder offers: a feature map, its geometry, the layers that learn, and where its weights come from."""

from collections.abc import Mapping

from torch import Tensor, nn

from patchnetvlad.encoders.published import none_published
from patchnetvlad.patch_grid import EncoderGeometry


class Encoder(nn.Module):
    """Pictures, N×3×H×W, normalised by ImageNet's mean and deviation, to a feature map N×channels×h×w.

    A kind of encoder states ``channels`` and ``geometry``, on the class where they are the same for all of its kind,
    and ``forward``. Weights are random until a state is loaded. The rest describes an encoder without weights, and is
    replaced by one that has some.
    """

    channels: int
    geometry: EncoderGeometry

    @classmethod
    def stated_geometry(cls, *arguments: str) -> EncoderGeometry:
        """The geometry of the encoder of these arguments, before there is one."""
        return cls.geometry

    def last_stage(self) -> tuple[str, ...]:
        """Names of the submodules that learn when the encoder is trained for places; none if it cannot learn."""
        return ()

    def in_two(self) -> tuple[nn.Module, nn.Module]:
        """Two modules that are the encoder when the second is applied to the output of the first.

        All of `last_stage` is in the second. The later the second begins, the less is computed anew in every step of
        training, which keeps the first one's output.
        """
        return (nn.Identity(), self) if self.last_stage() else (self, nn.Identity())

    def published_state(self) -> Mapping[str, Tensor]:
        """A state as the encoder was published with, fetched or taken from a cache.

        Raises OSError when that fails, UserError where none is published.
        """
        raise none_published()

    def own_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a state of the encoder's publisher, under the publisher's names, means for this module.

        Layers that the encoder does not have are left out. Raises KeyError or ValueError, saying which, where one is
        missing or has another shape.
        """
        return {key: state[key] for key in self.state_dict()}
