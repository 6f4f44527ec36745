# %% [markdown]
# # From two photographs to a 3-D model, and to a student of your own
#
# This notebook matches two photographs, computes the 3-D points that they show, and fine-tunes the student that
# ships. It downloads nothing and takes a minute or two on a CPU. Editors open it as it is; for Jupyter, `pip install
# jupytext` and `jupytext --to ipynb two-photographs-to-a-model.py`.

# %%
import shlex
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import poselib
import skimage.data
from PIL import Image

from samfeat import SAMFeat, match, show_keypoints, show_matches
from samfeat.cli import app

STEPS, CROP_SIZE = 20, 256  # of fine-tuning: hundreds and 400 for real training
FOLDER = Path("notebook")

# %% [markdown]
# ## Features
#
# Two photographs of one motorcycle, from Middlebury's stereo data (in scikit-image). `extract` also takes paths, PIL
# images and torch tensors.

# %%
left, right, disparity = skimage.data.stereo_motorcycle()
student = SAMFeat.from_pretrained()
features0, features1 = student.extract([left, right])
show_keypoints(left, features0)

# %% [markdown]
# ## Matches
#
# Mutual nearest neighbours by the dot product of the descriptors. `keypoints` are (x, y) in pixels, (0, 0) is the
# centre of the top-left one.

# %%
matches = match(features0, features1)["matches"]
points0 = features0["keypoints"][matches[:, 0]].numpy()
points1 = features1["keypoints"][matches[:, 1]].numpy()
show_matches(left, right, features0, features1, matches)

# %% [markdown]
# ## Pose
#
# Middlebury gives the focal length and the principal points. With these, poselib finds the pose of the second camera
# and the matches that agree with it: here the camera moved to the right, and did not turn.

# %%
focal, centre0, centre1 = 994.978, np.array([311.193, 254.877]), np.array([342.279, 254.877])
height, width = left.shape[:2]
camera0, camera1 = (
    {"model": "SIMPLE_PINHOLE", "width": width, "height": height, "params": [focal, *centre]}
    for centre in (centre0, centre1)
)
pose, info = poselib.estimate_relative_pose(points0, points1, camera0, camera1, {"max_epipolar_error": 1.0}, {})
kept = np.array(info["inliers"])
angle = np.degrees(np.linalg.norm(cv2.Rodrigues(pose.R)[0]))
print(f"{kept.sum()} of {len(matches)} matches fit; rotation {angle:.3f} degrees, camera moved by {-pose.R.T @ pose.t}")

# %% [markdown]
# ## 3-D points
#
# Two photographs leave the scale open; the cameras are 0.193 m apart, which makes it metres. For more than two
# photographs, `samfeat-cli evaluate reconstruct --data FOLDER` runs COLMAP on these features.

# %%
baseline = 0.193001
rays0, rays1 = (points0[kept] - centre0) / focal, (points1[kept] - centre1) / focal
homogeneous = cv2.triangulatePoints(np.eye(3, 4), np.column_stack((pose.R, pose.t)), rays0.T, rays1.T)
model = baseline / np.linalg.norm(pose.t) * (homogeneous[:3] / homogeneous[3]).T
pixels = tuple(np.rint(points0[kept][:, ::-1]).astype(int).T)
colours = left[pixels] / 255
axes = plt.figure(figsize=(8, 6)).add_subplot(projection="3d")
axes.scatter(model[:, 0], model[:, 2], -model[:, 1], c=colours, s=4)
axes.set(xlabel="x [m]", ylabel="depth [m]", zlabel="height [m]")
axes.view_init(elev=15, azim=-75)
axes.set_box_aspect(np.ptp(model[:, [0, 2, 1]], axis=0))

# %% [markdown]
# Middlebury measured the disparity of every pixel, and with it the depth:

# %%
measured = disparity[pixels]
known = np.isfinite(measured)
depth = focal * baseline / (measured[known] + centre1[0] - centre0[0])
errors = np.abs(model[known, 2] - depth) / depth
print(f"error of the depth: {np.median(errors):.1%} in the median, below 5% for {np.mean(errors < 0.05):.0%}")

# %% [markdown]
# ## Fine-tuning
#
# Training reads a cache that a teacher has filled: by default `classical`, which needs no weights; `--teacher
# sam_vit_h` downloads SAM. Any folder of photographs will do, here six of scikit-image's. What follows are the
# commands of a shell.


# %%
def samfeat_cli(line):
    """Run `samfeat-cli LINE`."""
    app(shlex.split(line), standalone_mode=False)


photos = FOLDER / "photos"
photos.mkdir(parents=True, exist_ok=True)
for name in ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "hubble_deep_field"):
    Image.fromarray(getattr(skimage.data, name)()).save(photos / f"{name}.png")
samfeat_cli(f"teacher-cache --data {photos} --cache {FOLDER}/cache --crop-size {CROP_SIZE}")

# %%
samfeat_cli(
    f"train --cache {FOLDER}/cache --out {FOLDER}/run --init samfeat --resume auto optimiser.steps={STEPS} "
    f"optimiser.learning_rate=0.0003 data.views.size={CROP_SIZE // 4 * 3} run.validate_every={STEPS}"
)

# %% [markdown]
# `notebook/run/report.html` shows the losses and the matches. The new weights load as the shipped ones do:

# %%
tuned = SAMFeat.from_pretrained(FOLDER / "run" / "weights.safetensors")
tuned0, tuned1 = tuned.extract([left, right])
tuned_matches = match(tuned0, tuned1)
show_matches(left, right, tuned0, tuned1, tuned_matches)
