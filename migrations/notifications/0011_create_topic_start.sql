-- Where the reading of each partition began: `kafka.start` counts once. Whoever finds no committed offset, or one that the
-- partition has not, after that begins at the earliest and says so: what was read before is recognised, what is skipped
-- would be lost.
CREATE TABLE notifications.topic_start (
    cluster_id TEXT        NOT NULL,
    topic      TEXT        NOT NULL,
    partition  INTEGER     NOT NULL,
    "offset"   BIGINT      NOT NULL,
    -- what chose it: kafka.start as it was then, or `committed`, the offset that the group had already
    chosen_by  TEXT        NOT NULL,
    chosen_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    -- when Kafka had it as the group's committed offset; until then it is what to begin at
    begun_at   TIMESTAMPTZ,

    CONSTRAINT topic_start_pk PRIMARY KEY (cluster_id, topic, partition),
    CONSTRAINT topic_start_offset_not_negative CHECK ("offset" >= 0)
);
