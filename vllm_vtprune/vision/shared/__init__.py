# SPDX-License-Identifier: Apache-2.0
"""One vision tower for several API processes (`--vtprune-tower shared`).

A process of its own holds the tower of one GPU, or of a machine without one: `process` is that process,
`client` what an API process has in place of `vision.service.VisionService`, `channel` how the two talk.
"""
