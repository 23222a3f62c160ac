"""One model on several devices: layers in line, or a part of every layer on each. Done before an engine sees it."""
