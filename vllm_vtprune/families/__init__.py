# SPDX-License-Identifier: Apache-2.0
"""Model families: what differs between them, one adapter a file. Nothing here knows of vLLM."""
