# SPDX-License-Identifier: Apache-2.0
"""What `shira train` is made of: options, data, model, training, and what is written at the end."""
