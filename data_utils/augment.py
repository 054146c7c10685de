"""Image augmentation: one draw of crop, rotation and colour, shared by all cameras of an item."""

from dataclasses import dataclass

import cv2
import numpy as np

CROP = 0.95  # of each side
MAX_ANGLE = 5.0  # degrees
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601 luma


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

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> the same shape."""
        image = self._warp(image)
        steps = (self._adjust_brightness, self._adjust_contrast, self._adjust_saturation)
        for step in self.order:
            image = steps[step](image)
        return image

    def _warp(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        crop_height, crop_width = int(height * CROP), int(width * CROP)
        top = int(self.top * (height - crop_height + 1))
        left = int(self.left * (width - crop_width + 1))
        crop = image[top : top + crop_height, left : left + crop_width]
        # Resize back and rotate in one warp. It reads the crop only, so what rotation brings in is black.
        resize = np.array(
            [
                [width / crop_width, 0, (width / crop_width - 1) / 2],
                [0, height / crop_height, (height / crop_height - 1) / 2],
                [0, 0, 1],
            ]
        )
        rotate = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), self.angle, 1.0)
        return cv2.warpAffine(crop, rotate @ resize, (width, height), flags=cv2.INTER_LINEAR)

    def _adjust_brightness(self, image: np.ndarray) -> np.ndarray:
        return cv2.LUT(image, _table(self.brightness, 0.0))

    def _adjust_contrast(self, image: np.ndarray) -> np.ndarray:
        mean = float(np.dot(cv2.mean(image)[:3], _GREY))
        return cv2.LUT(image, _table(self.contrast, (1 - self.contrast) * mean))

    def _adjust_saturation(self, image: np.ndarray) -> np.ndarray:
        mix = self.saturation * np.eye(3, dtype=np.float32) + (1 - self.saturation) * _GREY[None]
        return cv2.transform(image, mix)


def _table(gain: float, offset: float) -> np.ndarray:
    return np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8)


def center_crop(image: np.ndarray) -> np.ndarray:
    """What an acting policy sees: the middle 95 % of each side, resized back. (H, W, 3) uint8 -> the same shape."""
    height, width = image.shape[:2]
    crop_height, crop_width = int(height * CROP), int(width * CROP)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    crop = image[top : top + crop_height, left : left + crop_width]
    return cv2.resize(crop, (width, height), interpolation=cv2.INTER_LINEAR)
