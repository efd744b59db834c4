-- What the functions of events have in common; it stands before each of them. KEYS: everything of a shard that is about event names,
-- named in every call (see job.lua). Times are Unix milliseconds and come with the call.
--
--   names    sorted set in order, 'event name\0job id\0c' or 't', a token, '.' and a place in the order: whom an event cancels or triggers
--   recent   hash, event name -> 'at event-id' of the newest event
--   event    hash, 'event name\0event id' -> 'at kind', a place in the order, then ' cancelled triggered' once it was driven to every job
--   events   sorted set, events that were driven to the end by when they came
--   open     sorted set, those that were not
--   order    how many registrations and events there were: which of them came first is decided here, not by the clocks of who made them
local call = redis.call
local NAMES, RECENT, EVENT, EVENTS, OPEN, ORDER = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local function next_place() return string.format('%.0f', call('INCR', ORDER)) end
