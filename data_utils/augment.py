"""Image augmentation: one draw of crop, rotation and colour, shared by all cameras of an item."""

from dataclasses import dataclass

import cv2
import numpy as np

CROP = 0.95  # of each side
MAX_ANGLE = 5.0  # degrees
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601 luma
_EYE = np.eye(3)


@dataclass
class Augmentation:
    """One draw. `top`, `left` in [0, 1) place the crop, `angle` is in degrees, the factors multiply; `order` is the
    sequence in which brightness (0), contrast (1) and saturation (2) are applied."""

    top: float
    left: float
    angle: float
    brightness: float
    contrast: float
    saturation: float
    order: tuple[int, int, int]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Augmentation":
        def around_one(half_width: float) -> float:
            return rng.uniform(1 - half_width, 1 + half_width)

        return cls(
            top=rng.random(),
            left=rng.random(),
            angle=rng.uniform(-MAX_ANGLE, MAX_ANGLE),
            brightness=around_one(BRIGHTNESS),
            contrast=around_one(CONTRAST),
            saturation=around_one(SATURATION),
            order=tuple(rng.permutation(3).tolist()),
        )

    def __call__(self, image: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> the same shape, or `size` (width, height)."""
        image = self._warp(image, size or image.shape[1::-1])
        steps = (self._adjust_brightness, self._adjust_contrast, self._adjust_saturation)
        for step in self.order:
            image = steps[step](image)
        return image

    def _warp(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Crop, resize and rotation in one. It reads the crop only, so what rotation brings in is black."""
        height, width = image.shape[:2]
        crop_height, crop_width = int(height * CROP), int(width * CROP)
        top = int(self.top * (height - crop_height + 1))
        left = int(self.left * (width - crop_width + 1))
        crop = image[top : top + crop_height, left : left + crop_width]
        # rotated at the image's own size, about its centre; then scaled to `size`
        rotate = np.vstack([cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), self.angle, 1.0), [0, 0, 1]])
        matrix = _scale((width, height), size) @ rotate @ _scale((crop_width, crop_height), (width, height))
        # cv2 warps pixels of four bytes twice as fast as those of three
        warped = cv2.warpAffine(cv2.cvtColor(crop, cv2.COLOR_RGB2RGBA), matrix[:2], size, flags=cv2.INTER_LINEAR)
        return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)

    # cv2.transform rounds and keeps to 0 .. 255 after every step, as the reference does

    def _adjust_brightness(self, image: np.ndarray) -> np.ndarray:
        return cv2.transform(image, self.brightness * _EYE)

    def _adjust_contrast(self, image: np.ndarray) -> np.ndarray:
        mean = np.dot(cv2.mean(image)[:3], _GREY)
        return cv2.transform(image, np.column_stack([self.contrast * _EYE, np.full(3, (1 - self.contrast) * mean)]))

    def _adjust_saturation(self, image: np.ndarray) -> np.ndarray:
        return cv2.transform(image, self.saturation * _EYE + (1 - self.saturation) * _GREY)


def _scale(old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """The resize from `old` to `new` (width, height) as a matrix; a pixel's centre is at half its width."""
    x, y = new[0] / old[0], new[1] / old[1]
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def center_crop(image: np.ndarray) -> np.ndarray:
    """What an acting policy sees: the middle 95 % of each side, resized back. (H, W, 3) uint8 -> the same shape."""
    height, width = image.shape[:2]
    crop_height, crop_width = int(height * CROP), int(width * CROP)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    crop = image[top : top + crop_height, left : left + crop_width]
    return cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR)
