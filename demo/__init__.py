# SPDX-License-Identifier: Apache-2.0
"""How the embedded demo model was made: scenes, architecture, training, export and accuracy."""
