# SPDX-License-Identifier: Apache-2.0
"""Deployments on engines that exist; `make test-deploy` has what they need."""
