# SPDX-License-Identifier: Apache-2.0
"""How the embedded demo model was made: architecture, training and export."""
