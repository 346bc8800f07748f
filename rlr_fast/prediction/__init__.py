"""Files of images into rows of a table: prediction once, by several processes, or as files arrive.

May import `inference` and what lies below it.
"""
