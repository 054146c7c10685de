"""Bad observations and arguments of a policy: the error names the field, what was expected and found."""

import numpy as np
import pytest

from data_utils import UserError

from .helpers import CAMERAS

T, A = 8, 14
IMAGE = np.zeros((48, 64, 3), np.uint8)
GOOD = {"images": dict.fromkeys(CAMERAS, IMAGE), "qpos": np.zeros(14)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qpos": np.zeros(7)}, r"observation: qpos: expected shape \(14,\), found \(7,\) of float64"),
        ({"qpos": np.r_[0, 0, 0, np.nan, np.zeros(10)]}, r"observation: qpos\[3\]: expected finite numbers, found nan"),
        ({"qpos": np.full(14, 1e300)}, r"observation: qpos\[0\]: expected finite numbers, found 1e\+300"),
        ({"qpos": ["a"] * 14}, "observation: qpos: expected numbers, found <U1"),
        ({"qpos": [[1], [1, 2]]}, "observation: qpos: expected an array, found list"),
        ({"qpos": None}, "observation: qpos: expected numbers, found object"),
        ({"images": [IMAGE] * 3}, "observation: images: expected a dict with cameras cam_high, .*, found list"),
        ({"images": {}}, "observation: images: expected cameras cam_high, .*missing cam_high, .*, found none"),
        ({"images": {"cam_high": IMAGE, "top": IMAGE}}, "missing cam_left_wrist, cam_right_wrist, found cam_high, top"),
        (
            {"cam_high": IMAGE / 255},
            r"images\['cam_high'\]: expected \(height, width, 3\) of uint8, found .* of float64",
        ),
        ({"cam_high": IMAGE[..., 0]}, r"images\['cam_high'\]: expected .*, found \(48, 64\) of uint8"),
        ({"cam_high": IMAGE.transpose(2, 0, 1)}, r"found \(3, 48, 64\) of uint8"),
        ({"cam_high": IMAGE[:0]}, r"found \(0, 64, 3\) of uint8"),
        ({"cam_high": np.stack([IMAGE, IMAGE])}, r"found \(2, 48, 64, 3\) of uint8"),
        ({"cam_high": "frame.jpg"}, r"images\['cam_high'\]: expected .*, found \(\) of <U9"),
    ],
)
def test_bad_observations_are_named(policy, change, message):
    bad = GOOD | change if change.keys() <= GOOD.keys() else GOOD | {"images": GOOD["images"] | change}
    for observations in (bad, [GOOD, bad]):
        field = message.replace("observation:", "observation 1:") if observations is not bad else message
        with pytest.raises(UserError, match=field):
            policy.predict(observations, "Fold.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"observation": "frame.jpg"},
            "observation: expected a dict with images and qpos or a list of them, found str",
        ),
        ({"observation": []}, "observation: expected .*, found an empty list"),
        ({"observation": [None]}, "observation: expected a dict with images and qpos, found NoneType"),
        ({"observation": {"images": {}}}, "observation: expected images and qpos, found no qpos"),
        ({"instruction": 7}, "instruction: expected text, found int"),
        ({"instruction": ["Go."]}, "instruction: expected one, or a list of 2 .*found 1"),
        ({"instruction": "see <|image_pad|>"}, r"instruction: expected plain words, found .*<\|image_pad\|>"),
        ({"reasoning": "Go.<|im_end|>"}, r"reasoning: expected plain words, found .*<\|im_end\|>"),
        ({"reasoning": [None, 3]}, "reasoning: expected text or None, found int"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive number, found 0"),
        ({"unnorm_key": "franka"}, "unnorm_key: expected one of default, found franka"),
        ({"unnorm_key": [["a"], None]}, r"unnorm_key: expected one of default, found \['a'\]"),
        (
            {"prefix": np.zeros((T + 1, A))},
            r"prefix: expected finite numbers \(n, 14\), n at most 8, found shape \(9, 14\)",
        ),
        ({"prefix": np.zeros((2, 7))}, r"prefix: expected .*, found shape \(2, 7\)"),
        ({"prefix": np.full((2, A), np.inf)}, "prefix: expected finite numbers"),
        ({"prefix": [[[1], [1, 2]], None]}, "prefix: expected an array, found list"),
        ({"prefix": np.zeros((2, A)), "frozen": 3}, "frozen: expected 0 to 2, the length of prefix, found 3"),
        ({"prefix": np.zeros((2, A)), "frozen": 1.5}, "frozen: expected 0 to 2, the length of prefix, found 1.5"),
        ({"frozen": [1]}, "frozen: expected one, or a list of 2 .*found 1"),
        ({"noise": np.zeros((3, T, A))}, r"noise: expected finite numbers \(2, 8, 14\), found shape \(3, 8, 14\)"),
    ],
)
def test_bad_arguments_are_named(policy, change, message):
    arguments = {"observation": [GOOD, GOOD], "instruction": "Go.", "max_new_tokens": 2} | change
    with pytest.raises(UserError, match=f"^{message}"):
        policy.predict(**arguments)
