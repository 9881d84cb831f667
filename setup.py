"""Package description; the folders users know at the top of a checkout travel inside the wheel."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "patchnetvlad/__init__.py").read_text())
DATA_FOLDERS = {
    "configs": ["*.ini"],
    "dataset_imagenames": ["*.txt"],
    "dataset_gt_files": ["*.npz"],
    "pretrained_models": ["builtin_*", "rootsift_*", "README.md", "NOTICE"],
    "example_images": ["*.json", "*.npz", "*/*.jpg"],
}
# Scripts that users know by their file names; the other commands have a thin script in tools/.
SCRIPTS = {  # module of patchnetvlad.commands: its commands
    "features": ["feature_extract", "feature_match"],
    "pairs": ["match_two", "match_realtime"],
    "models": ["download_models"],
    "training": ["train", "add_pca"],
}
TOOLS = {
    "models": ["fit_model", "combine_models"],
    "training": ["make_training_csv"],
    "features": ["build_index"],
    "places": ["evaluate_poses", "locate"],
    "datasets": ["make_dataset", "measure", "reproduce", "gen_image_file_list", "convert_kapture_to_msls"],
    "recognize": ["recognize"],
    "export": ["export_onnx", "export_hloc"],
    "examples": ["demo", "render_example_places", "render_msls"],
    "architecture": ["draw_architecture"],
    "bundled_model": ["make_bundled_model"],
}

setup(
    name="patchnetvlad",
    version=VERSION.group(1) if VERSION else "0",
    description="Visual place recognition with Patch-NetVLAD: retrieval, then re-ranking by patch descriptors",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "scipy>=1.11",
        "faiss-cpu>=1.11",
        "opencv-python-headless>=4.8",
        "threadpoolctl>=3.1",
        "natsort>=8",
        "tqdm>=4.60",
        "pillow>=10",
        "matplotlib>=3.8",
        "h5py>=3.8",
        "tensorboard>=2.14",
        "huggingface_hub>=0.23",
        "pyproj>=3.6",
        "jinja2>=3.1",
        "psutil>=5.9",
    ],
    extras_require={
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"],
        "timm": ["timm>=1.0"],
        "ray": ["ray>=2.50"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            # What pictures and measures are compared with; the package itself imports neither
            "torchvision>=0.21",
            "scikit-learn>=1.3",
            "ruff>=0.6",
            "mypy>=1.11",
            "selenium>=4.11",
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "onnxscript>=0.2",
            "timm>=1.0",
            "ray>=2.50",
            "pytorch-metric-learning>=2",
            "nbclient>=0.9",
            "nbformat>=5.9",
            "ipykernel>=6",
        ],
    },
    packages=[
        *find_packages(include=["patchnetvlad", "patchnetvlad.*"]),
        *(f"patchnetvlad.{folder}" for folder in DATA_FOLDERS),
    ],
    package_dir={f"patchnetvlad.{folder}": folder for folder in DATA_FOLDERS},
    package_data={
        "patchnetvlad": ["py.typed"],
        "patchnetvlad.report": ["template/*"],
        **{f"patchnetvlad.{folder}": patterns for folder, patterns in DATA_FOLDERS.items()},
    },
    scripts=[f"{name}.py" for names in SCRIPTS.values() for name in names],
    entry_points={
        "console_scripts": [
            f"patchnetvlad-{name.replace('_', '-')} = patchnetvlad.commands.{module}:{name}"
            for module, names in (*SCRIPTS.items(), *TOOLS.items())
            for name in names
        ]
    },
)
