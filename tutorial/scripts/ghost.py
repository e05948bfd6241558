"""Insert a message behind the chat's back, under the next number."""

from datetime import UTC, datetime

import pymongo
from client import database

messages = database().messages
newest = messages.find_one(sort=[("_id", pymongo.DESCENDING)])
number = newest["_id"] + 1
ghost = {
    "_id": number,
    "user": "ghost",
    "key": str(number),
    "text": "boo",
    "time": datetime.now(UTC),
}
messages.insert_one(ghost)
print("inserted number", number)
