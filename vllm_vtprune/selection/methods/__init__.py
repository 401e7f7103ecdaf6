# SPDX-License-Identifier: Apache-2.0
"""The selection methods, one file each."""
