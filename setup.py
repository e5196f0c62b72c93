"""Package metadata of payterm. Settings of the tools live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ON_HARDWARE = [
    "nfcpy>=1.0.4",
    "pyserial>=3.5",
    "luma.oled>=3.13",
    "gpiozero>=2",
    "pyscard>=2.3.1",
]

setup(
    name="payterm",
    version="0.1.0",
    description="An open payment terminal for the Raspberry Pi: test cards, closed-loop cards, laboratories",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # hw-sim/ is a source root (as src/ would be) that holds the package hwsim.
    packages=[
        *find_packages(".", include=["terminal*", "drivers*"]),
        *find_packages("hw-sim", include=["hwsim*"]),
    ],
    package_dir={"hwsim": "hw-sim/hwsim"},
    package_data={
        "terminal": ["py.typed", "ui/fonts/*", "ui/locale/*/LC_MESSAGES/*", "*.toml", "replay/*.schema.json"],
        "terminal.emv_keys": ["*.toml"],
        "drivers": ["py.typed"],
        "hwsim": ["py.typed", "cards/profiles/*.toml"],
    },
    install_requires=[
        "cryptography>=47",  # the first release with HPKE
        "peewee>=4.5",
        "Pillow>=10",
        "msgspec>=0.19",
        "requests>=2.31",
        "urllib3>=2",
        "certifi",
        "rich>=13",
        "stripe>=16.1,<17",  # 17 may pin another version of the interface
    ],
    extras_require={
        "pi": [*ON_HARDWARE, "lgpio>=0.2.2", "spidev>=3.5"],
        "sim": [*ON_HARDWARE, "h11>=0.14", "mfusepy>=3.1"],
        "dev": [
            *ON_HARDWARE,
            "h11>=0.14",
            "ber-tlv>=0.0.6",  # these four are measured against
            "litequeue>=0.9",
            "persist-queue>=1.1",
            "sqlcipher3>=0.6",
            "pyemv>=1.5",
            "atheris>=3; sys_platform == 'linux' and platform_machine == 'x86_64'",  # fuzzing, in make soak alone
            "babel>=2.12",
            "coverage>=7.4",
            "hypothesis>=6.100",
            "import-linter>=2.4",
            "jsonschema>=4.20",
            "mypy>=1.10",
            "openapi-spec-validator>=0.7",
            "pydantic>=2.7",
            "PyJWT>=2.8",
            "pytest>=8",
            "pytest-cov>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "PyYAML>=6",
            "ruff>=0.5",
            "schemathesis>=4.32,<5",
            "types-PyYAML",
            "types-requests",
        ],
    },
    entry_points={
        "console_scripts": [
            "payterm = terminal.__main__:main",
            "payterm-sim = hwsim.__main__:main",
        ]
    },
)
