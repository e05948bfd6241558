"""How many documents a collection has, and the first of them: python tutorial/show.py messages"""

import sys

from client import database

collection = database()[sys.argv[1]]
print(collection.count_documents({}), "documents in", collection.name)
for first in collection.find().sort("_id").limit(1):
    for name, value in first.items():
        print(f"{name}: {value}")
