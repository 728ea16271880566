"""How different the images of one prompt are: whether a model has kept more than one answer."""

from einops import rearrange
from torch import Tensor

from mmdit.errors import UserError


def pixel_deviation(images: Tensor, members: int) -> float:
    """The standard deviation of a pixel over the images of one prompt, from 0 to 127.5.

    It is the root of the mean over the other images for each value, then the mean over all values
    and prompts.

    Args:
        images: uint8 (prompts * members, h, w, 3), prompts outermost.
        members: number of images of each prompt.

    Raises:
        UserError: the images cannot be divided so.
    """
    if members < 1 or not len(images) or len(images) % members:
        raise UserError(f"{len(images)} images are not {members} images for each of some prompts")
    groups = rearrange(images, "(g m) h w c -> g m (h w c)", m=members).double()
    return groups.std(dim=1, correction=0).mean().item()
