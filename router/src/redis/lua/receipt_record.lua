-- Keeps a receipt that belongs to no inbox entry, under its message id.
-- KEYS[1]: what is known of the id: 'c' client, 'r' fingerprint '\n' receipt. ARGV: 1 fingerprint or '', 2 receipt, 3 how
-- long it is kept, in ms, 4 what is taken to be there by mistake, or ''.
-- Answers '' if it is kept; else what is there.
local there = redis.call('GET', KEYS[1])
if there == ARGV[4] then there = false end
local fingerprint = ARGV[1]
if there and fingerprint ~= '' then return there end
if there and string.sub(there, 1, 1) == 'r' then fingerprint = string.match(there, '^r([^\n]*)\n') end
redis.call('SET', KEYS[1], 'r' .. fingerprint .. '\n' .. ARGV[2], 'PX', ARGV[3])
return ''
