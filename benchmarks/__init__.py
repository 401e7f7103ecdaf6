# SPDX-License-Identifier: Apache-2.0
"""Load tester, side-by-side comparisons, and the bound that both are judged by."""
