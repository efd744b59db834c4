-- Notes that the client is about to be listed among the waiting. Answers 1 if something waits.
if (tonumber(call('HGET', META, 'c') or '0')) == 0 then return 0 end
call('HSET', META, 'w', 1)
return 1
