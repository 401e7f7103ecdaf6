# SPDX-License-Identifier: Apache-2.0
"""The model classes registered with vLLM."""
