# SPDX-License-Identifier: Apache-2.0
"""The version of the package: its one source, read by the build and by ``shira.__version__``."""

__version__ = "0.1.0"
