#!/usr/bin/env python3
"""replay.py [--update] DAEMON [SCENARIO...]: play the recorded scenarios against DAEMON and hold them against QEMU's.

Every reply, the order and data of events, and what is on disk at the end must be QEMU's, but for what deviations.json
lists with its reason; a listed deviation that is none any more fails, too. Prints a line a scenario and, for one that
fails, every difference. --update rewrites deviations.json, keeping the reasons; new entries get the reason "?", which
fails until somebody has written one.

Where a scenario waits for what does not happen here, what follows is not played; the list shows that as "rest".
"""
import difflib, glob, json, os, subprocess, sys, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
LIST = os.path.join(HERE, "deviations.json")
VOLATILE = {"package", "actual-size", "speed-avg"}
INFO = ("filename", "format", "virtual-size", "backing-filename", "backing-filename-format", "cluster-size")
CHECK = ("check-errors", "corruptions", "leaks")


def read_lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def read_json(path):
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


def strip(value):
    """Without what differs from run to run, and names made of JSON with their members in order."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in sorted(value.items()) if k not in VOLATILE}
    if isinstance(value, list):
        return [strip(v) for v in value]
    if isinstance(value, str) and value.startswith("json:"):
        return "json:" + json.dumps(strip(json.loads(value[len("json:"):])))
    return value


def split(log):
    """Steps: requests with their replies and the events before the next request; in order."""
    steps, pending = [{"request": None, "reply": None, "events": []}], {}
    for line in log:
        message = line.get("msg")
        if line["dir"] == "->":
            step = {"request": message or {"raw": line.get("raw")}, "reply": None, "events": []}
            pending.setdefault(line["peer"], []).append(step)
            steps.append(step)
        elif line["dir"] == "<-" and message is None:
            steps.append({"request": {"execute": "raw"}, "reply": line.get("raw"), "events": []})
        elif line["dir"] == "<-" and "event" in message:
            steps[-1]["events"].append([message["event"], strip(message.get("data"))])
        elif line["dir"] == "<-" and "QMP" not in message:
            step = (pending.get(line["peer"]) or [{}]).pop(0)
            step["reply"] = strip(message)
    return steps


def command(step):
    return (step["request"] or {}).get("execute") or "raw"


def paired(theirs, ours):
    """Steps side by side; events likewise."""
    def key(step):
        return json.dumps(step["request"], sort_keys=True)

    matcher = difflib.SequenceMatcher(None, list(map(key, theirs)), list(map(key, ours)), autojunk=False)
    pairs, their_events, our_events = [], [], []
    for tag, i, j, k, l in matcher.get_opcodes():
        events = without_drains if tag == "equal" else list
        for n in range(max(j - i, l - k)):
            a, b = (x[m + n] if m + n < e else None for x, m, e in ((theirs, i, j), (ours, k, l)))
            pairs.append((a, b))
            their_events += events(a["events"]) if a else []
            our_events += events(b["events"]) if b else []
    return pairs, their_events, our_events


def job_of(event):
    data = event[1] or {}
    return data.get("id") if event[0] == "JOB_STATUS_CHANGE" else data.get("device")


def without_drains(events):
    """Of one step, without the pauses in which QEMU changes its graph while a job runs: nobody has asked for them."""
    result = []
    for event in events:
        before = next((e for e in reversed(result) if job_of(e) == job_of(event)), None)
        if before and before[0] == event[0] == "JOB_STATUS_CHANGE" and \
                (before[1]["status"], event[1]["status"]) in (("paused", "running"), ("standby", "ready")):
            result.remove(before)
        else:
            result.append(event)
    return result


def essence(end):
    """What a user relies on in the images left behind: names, formats, sizes, links, cleanness, content; not layout."""
    if not isinstance(end, dict):
        return end
    result = {}
    for name, image in end.items():
        if not isinstance(image, dict) or not image.keys() & {"content-sha256", "backing-chain"}:
            result[name] = image
            continue
        chain, check = image.get("backing-chain"), image.get("check")
        if isinstance(chain, list):
            chain = [{k: i.get(k) for k in INFO} for i in chain]
        if isinstance(check, dict):
            check = {k: check.get(k) for k in CHECK}
        result[name] = {"chain": chain, "check": check, "rc": image.get("check-rc"), "sha": image.get("content-sha256")}
    return result


def same(theirs, ours):
    """Equal, but that our objects may have more members."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return all(k in ours and same(v, ours[k]) for k, v in theirs.items())
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(theirs) == len(ours) and all(map(same, theirs, ours))
    return theirs == ours


def summary(value):
    """Of a reply or a list, what a list of deviations shows."""
    if isinstance(value, dict) and "error" in value:
        value = value["error"]["desc"]
    elif isinstance(value, dict) and "return" in value:
        value = value["return"]
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:300] + "..."


def place_order(place):
    return (0, int(place), "") if place.isdigit() else (1, 0, place)


def first_difference(theirs, ours, path=""):
    """Where two values differ first, for people."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(f"{path}.{k}", v, ours.get(k)) for k, v in theirs.items()]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(f"{path}[{i}]", x, y) for i, (x, y) in enumerate(zip(theirs, ours))]
    else:
        return f"{path or 'all'}: {summary(theirs)} <> {summary(ours)}"
    return next((first_difference(x, y, p) for p, x, y in pairs if not same(x, y)), "")


def differences(name, out):
    """Place (number of the reply, or 'events', 'end', 'rest') to what stands there."""
    theirs_path = os.path.join(HERE, "recorded", name)
    our_log = read_lines(os.path.join(out, name + ".jsonl"))
    theirs, ours = split(read_lines(theirs_path + ".jsonl")), split(our_log)
    broken = next((l["note"] for l in our_log if l.get("note", "").startswith("RECORDER FAILED")), None)
    if broken:
        theirs = theirs[:len(ours)]
    pairs, their_events, our_events = paired(theirs, ours)
    found, number = {}, -1
    for a, b in pairs:
        if all(x is None or x["reply"] is None for x in (a, b)):
            continue
        number += 1
        a, b = ((command(x), x["reply"]) if x else ("nothing", None) for x in (a, b))
        if a[0] != b[0] or not same(a[1], b[1]):
            found[str(number)] = {"command": str(a[0]), "difference": first_difference(a[1], b[1])}
    if broken:
        found["rest"] = {"difference": "not played: " + broken.split(": ", 1)[1]}
        return found
    if their_events != our_events:
        found["events"] = {"difference": first_difference(their_events, our_events)}
    a, b = (essence(strip(read_json(p + ".end.json"))) for p in (theirs_path, os.path.join(out, name)))
    for image in sorted((a or {}).keys() | (b or {}).keys()):
        x, y = (a or {}).get(image), (b or {}).get(image)
        if x != y:
            found["end " + image] = {"difference": first_difference(x, y)}
    return found


def judge(found, listed):
    """Lines about what differs and is not listed, or is listed and does not differ like that."""
    lines = []
    for place in sorted(found.keys() | listed.keys(), key=place_order):
        now, known = found.get(place), dict(listed.get(place) or {})
        why = known.pop("why", None)
        if now is None:
            lines.append(f"  {place}: listed, but equal now: {known}")
        elif now != known:
            lines.append(f"  {place}: {json.dumps(now)}" + (f"\n    listed as: {json.dumps(known)}" if known else ""))
        elif not why or why == "?":
            lines.append(f"  {place}: listed without a reason")
    return lines


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    update = "--update" in sys.argv
    daemon, wanted = os.path.abspath(words[0]), words[1:]
    listed = read_json(LIST) or {}
    out = tempfile.mkdtemp(prefix="replay-")
    environment = dict(os.environ, QSD=daemon, PYTHONDONTWRITEBYTECODE="1")
    failed = count = 0
    for path in sorted(glob.glob(os.path.join(HERE, "recorded", "*.jsonl"))):
        name = os.path.basename(path)[: -len(".jsonl")]
        if wanted and not any(name.startswith(word) for word in wanted):
            continue
        subprocess.run([sys.executable, os.path.join(HERE, "record.py"), "-o", out, name], env=environment, check=False,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
        found = differences(name, out)
        if update:
            old = listed.get(name, {})
            listed[name] = {p: dict(d, why=old.get(p, {}).get("why", "?")) for p, d in found.items()}
        lines = judge(found, listed.get(name, {}))
        count += 1
        failed += bool(lines)
        print(f"{'FAIL' if lines else 'ok  '} {name}: {len(found)} deviations", *lines, sep="\n", flush=True)
    if update:
        with open(LIST, "w") as file:
            json.dump({name: d for name, d in sorted(listed.items()) if d}, file, indent=1)
            file.write("\n")
    print(f"{max(0, count - failed)} passed, {failed} failed")
    sys.exit(bool(failed) or not count)


main()
