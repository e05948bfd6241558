"""How many documents of a collection match, and the last of them.

python tutorial/scripts/query.py messages
python tutorial/scripts/query.py users login=Ann
"""

import sys

from client import database

_, collection, *conditions = sys.argv
wanted = dict(condition.split("=", 1) for condition in conditions)
documents = list(database()[collection].find(wanted).sort("_id"))
print(f"documents in {collection}: {len(documents)}")
for last in documents[-1:]:
    for name, value in last.items():
        print(f"{name}: {value}")
