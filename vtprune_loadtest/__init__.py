# SPDX-License-Identifier: Apache-2.0
"""The load tester's parts, from the arrival times to the plots."""
