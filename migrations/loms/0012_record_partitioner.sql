-- What the relay's events are spread over the partitions with. An order's events are in order because they are in one partition:
-- whoever changes how that is chosen while events wait sends the next to another, and a consumer may see it first.
-- NULL: a release before this one was the last to send, which knew consistent_random only; it goes on beside this.
ALTER TABLE loms.relay ADD COLUMN partitioner TEXT;
