# SPDX-License-Identifier: Apache-2.0
"""Around every route, the innermost first: errors, body limit, drain, request ids, the API key."""
