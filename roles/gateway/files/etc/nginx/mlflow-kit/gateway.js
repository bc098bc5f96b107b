// A fingerprint of the credential that came with a request: what verdicts are remembered by,
// so that no password stands in a cache, and what bearer tokens are looked up by.
import crypto from 'crypto';

function credential(r) {
    const header = r.headersIn['Authorization'];
    return header ? crypto.createHash('sha256').update(header).digest('hex') : '';
}

export default {credential};
